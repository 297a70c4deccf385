"""Small classifiers of d2o's own as features: `digits` and `cifar16`, which ship, and those that `d2o train` makes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.features.backbone import SIZE, Backbone
from d2o.features.base import Features, placed
from d2o.interop.assets import asset
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import file_sha256, load_file
from d2o.networks.classifier import Classifier
from d2o.networks.load import load_weights

NAMES = ("digits", "cifar16")
"""Those that ship: d2o/assets/classifier_NAME.safetensors, by the recipe classifier_NAME."""


class ClassifierFeatures(Features):
    """Vector: the penultimate activations. Maps: those of each stage. Takes images of one shape."""

    network: Classifier

    def __init__(self, name: str, network: Classifier, sha256: str = ""):
        config = network.config
        shape = (config["img_channels"], config["img_resolution"], config["img_resolution"])
        super().__init__(
            name,
            network,
            config["feature_dim"],
            sha256,
            shape=shape,
            classes=config["classes"],
            outputs=("features", "logits"),
        )

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def taps(self, x: Tensor) -> list[Tensor]:
        return self.network.maps(x)

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        features = self.network.features(x)
        return {name: features if name == "features" else self.network.output(features) for name in wanted}


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The classifier that ships, or another in its place. UserError: it is missing, or as `read_classifier`."""
    path = weights or asset(f"classifier_{name}.safetensors")
    if not path.exists():
        raise UserError(
            f"the weights of the extractor {name!r} are missing (d2o/assets/classifier_{name}.safetensors)",
            f"re-install d2o, or train them: d2o train recipes/classifier_{name}.yaml, then --extractor PATH",
        )
    return read_classifier(name, path, device)


def load_as_backbone(
    name: str, weights: Path | None = None, device: str | torch.device = "cpu", size: int = SIZE
) -> Backbone:
    """The classifier's four stages as a backbone, whose images are resized to `size` pixels; two maps of that size and
    two of half of it. Errors as `load`."""
    features = load(name, weights, device)
    assert isinstance(features, ClassifierFeatures)
    network, half = features.network, [0.5] * features.network.config["img_channels"]
    found = Backbone(
        [nn.Sequential(*stage, nn.SiLU()) for stage in network.stages()],
        [stage[0].out_channels for stage in network.stages()],
        half,
        half,
        size=size,
        name=name,
        sha256=features.sha256,
        takes=(len(half),),
    )
    placed(found, device)
    return found


def read_classifier(name: str, path: Path, device: str | torch.device = "cpu") -> ClassifierFeatures:
    """The classifier in a checkpoint of kind "extractor". UserError: missing, truncated or foreign file, or of another
    kind."""
    tensors, meta = load_file(path)
    if meta.get("kind") != "extractor":
        raise UserError(
            f"{path} holds a {meta.get('kind', 'foreign object')}, not a feature extractor",
            "`d2o train recipes/classifier_digits.yaml` makes one",
        )
    network = load_weights(check_checkpoint(meta, path)["network"], tensors, path)
    if not isinstance(network, Classifier):
        raise UserError(f"{path}: a {type(network).__name__} has no features; an extractor is a classifier")
    features = ClassifierFeatures(name, network, file_sha256(path))
    features.to(device, torch.float32)
    return features
