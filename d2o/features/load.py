"""Feature extractors by name. Absent weights are an error that says what to fetch; nothing is ever substituted
silently."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2o.errors import UserError, nearest
from d2o.features.extractor import Extractor, check_shape, describe_shape
from d2o.interop.assets import asset
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import file_sha256, load_file
from d2o.networks.classifier import Classifier
from d2o.networks.load import load_weights

__all__ = [
    "EXTRACTORS",
    "ClassifierExtractor",
    "Extractor",
    "check_shape",
    "default_extractor",
    "extractor_names",
    "load_extractor",
]

Device = str | torch.device


class ClassifierExtractor(Extractor):
    """A small classifier of d2o's own: its penultimate activations, and its class logits. Takes images of one shape."""

    def __init__(self, name: str, network: Classifier, sha256: str, device: Device = "cpu"):
        config: dict[str, Any] = network.config
        shape = (config["img_channels"], config["img_resolution"], config["img_resolution"])
        super().__init__(
            name,
            config["feature_dim"],
            sha256,
            device,
            shape=shape,
            classes=config["classes"],
            outputs=("features", "logits"),
        )
        self.network = network.to(self.device, torch.float32).eval().requires_grad_(False)

    def run(self, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        features = self.network.features(images.to(self.device).to(torch.float32) / 127.5 - 1)
        return {name: features if name == "features" else self.network.output(features) for name in wanted}

    def maps(self, x: Tensor) -> list[Tensor]:
        """Float images [B, C, H, W] in [-1, 1] on the extractor's device -> feature maps [B, c, h, w], fine first.
        Differentiable in x."""
        return self.network.maps(x)


def read_extractor(name: str, path: Path, device: Device = "cpu") -> ClassifierExtractor:
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
    return ClassifierExtractor(name, network, file_sha256(path), device)


def _digits(name: str, weights: Path | None, device: Device) -> Extractor:
    path = weights or asset("classifier_digits.safetensors")
    if not path.exists():
        raise UserError(
            "the weights of the extractor 'digits' are missing (d2o/assets/classifier_digits.safetensors)",
            "re-install d2o, or train them: d2o train recipes/classifier_digits.yaml, then --extractor PATH",
        )
    return read_extractor("digits", path, device)


def _from(module: str) -> Callable[[str, Path | None, Device], Extractor]:
    """The loader of d2o.features.<module>, imported when it is needed."""

    def load(name: str, weights: Path | None, device: Device) -> Extractor:
        return importlib.import_module(f"d2o.features.{module}").load(name, weights, device)

    return load


EXTRACTORS: dict[str, Callable[[str, Path | None, Device], Extractor]] = {
    "digits": _digits,
    **{
        name: _from("inception")
        for name in (
            "inception",
            "inception-tf",
            "inception-clean",
            "inception-clean_torch",
            "inception-legacy_pytorch",
        )
    },
    **{name: _from("dinov2") for name in ("dinov2_vitl14", "dinov2_vitb14", "dinov2_vits14")},
    **{name: _from("clip") for name in ("clip", "clip-vit-b-32", "clip-vit-g-14")},
    "vgg16-fc2": _from("vgg"),
    "lite0": _from("lite0"),
    "dreamsim": _from("dreamsim"),
}
"""Name -> function of (name, weights file or None, device)."""

DEFAULTS: dict[tuple[int, int, int], str] = {(1, 8, 8): "digits"}
"""Image shape -> extractor used when none is named."""
NATURAL = "lite0"
"""The same for all other images: its weights come with a package, so it works without a network. Not FID, and never
called so."""
SMALLEST = 16


def extractor_names() -> list[str]:
    return sorted(EXTRACTORS)


def load_extractor(name: str, device: Device = "cpu", weights: Path | None = None) -> Extractor:
    """A named extractor, or the path of an own classifier (.safetensors of kind "extractor"). `weights`: its weights
    file, instead of the one that is downloaded or ships.

    UserError: unknown name (with the list), absent weights (with what to fetch), a file of another kind.
    """
    if name in EXTRACTORS:
        with torch.random.fork_rng(devices=[]):  # a network draws initial weights before it takes those of its file
            return EXTRACTORS[name](name, weights, device)
    path = Path(name)
    if path.suffix != ".safetensors" and not path.exists():
        near = nearest(name, EXTRACTORS)
        raise UserError(
            f"unknown extractor {name!r}" + (f": did you mean {near!r}?" if near else ""),
            f"known: {', '.join(extractor_names())}; or the path of a classifier's .safetensors checkpoint",
        )
    with torch.random.fork_rng(devices=[]):
        extractor = read_extractor(path.stem, path, device)
    extractor.name = (  # an own network never passes for a shipped one of the same name
        f"{path.stem}@{extractor.sha256[:6]}"
    )
    return extractor


def load_classifier(name: str, device: Device = "cpu") -> ClassifierExtractor:
    """An extractor that is a classifier of d2o's own, whose maps can be differentiated. UserError: another one, and as
    `load_extractor`."""
    extractor = load_extractor(name, device)
    if not isinstance(extractor, ClassifierExtractor):
        hint = "take digits, or what `d2o train recipes/classifier_digits.yaml` makes"
        raise UserError(f"extractor {name!r} is not a classifier of d2o's own", hint)
    return extractor


def default_extractor(shape: tuple[int, ...]) -> str:
    """The extractor for images of `shape` (C, H, W) when none is named. UserError where there is no default."""
    if shape in DEFAULTS:
        return DEFAULTS[shape]
    if shape[0] == 3 and min(shape[1:]) >= SMALLEST:
        return NATURAL
    raise UserError(
        f"no default feature extractor for images of {describe_shape(shape)}; name one with --extractor",
        f"known: {', '.join(extractor_names())}; or the path of a classifier's .safetensors checkpoint",
    )
