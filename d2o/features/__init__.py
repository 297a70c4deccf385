"""Frozen networks with taps: what critics, losses and the evaluation look at images through."""
