"""Frozen networks with taps: what critics, losses and the evaluation look at images through."""

from d2o.features.backbone import Backbone
from d2o.features.base import Features
from d2o.features.load import load_backbone, load_features

__all__ = ["Backbone", "Features", "load_backbone", "load_features"]
