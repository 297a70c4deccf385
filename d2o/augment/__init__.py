"""Augmentations of images inside the training graph."""
