"""Floor 1: augmentations of images inside the training graph."""
