"""Feature extractors: frozen networks whose activations the metrics compare. One interface, one registry, never a silent substitute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2o.errors import UserError, nearest
from d2o.interop.safetensors_io import file_sha256, load_file
from d2o.networks.classifier import Classifier
from d2o.teachers.registry import asset, load_weights


class Extractor:
    """A frozen network with features.

    `name` for labels, `dim` of the features, `sha256` of the weights file, `shape` (C, H, W) of the images it takes, number of `classes`
    that it tells apart. Images of another shape are refused, never resized behind the user's back. Always float32, without TF32.
    """

    def __init__(self, name: str, network: Classifier, sha256: str, device: str | torch.device = "cpu"):
        self.name, self.sha256, self.device = name, sha256, torch.device(device)
        self.network = network.to(self.device, torch.float32).eval().requires_grad_(False)
        config: dict[str, Any] = network.config
        self.dim: int = config["feature_dim"]
        self.classes: int = config["classes"]
        self.shape = (config["img_channels"], config["img_resolution"], config["img_resolution"])

    def features(self, images: Tensor) -> Tensor:
        """uint8 images [n, C, H, W] -> features [n, dim] float32 on the extractor's device."""
        return self._run(self.network.features, images)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images [n, C, H, W] -> class logits [n, classes] float32."""
        return self._run(self.network, images)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both of the above in one pass."""
        features = self.features(images)
        with torch.inference_mode():
            return features, self.network.output(features)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Float images [B, C, H, W] in [-1, 1] on the extractor's device -> feature maps [B, c, h, w], fine first. Differentiable in x."""
        return self.network.maps(x)

    @torch.inference_mode()
    def _run(self, call: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(f"features are taken of uint8 images, not {images.dtype}")
        check_shape(tuple(images.shape[1:]), self)
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return call(images.to(self.device).to(torch.float32) / 127.5 - 1)


def check_shape(shape: tuple[int, ...], extractor: Extractor, of: str = "the images") -> None:
    """UserError unless images of `shape` (C, H, W) fit the extractor."""
    if shape != extractor.shape:
        raise UserError(
            f"{of} are {describe_shape(shape)}, but the extractor {extractor.name!r} takes {describe_shape(extractor.shape)}",
            "give another --extractor; for a set of images --resize crop scales and centre-crops, and the result says so",
        )


def describe_shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} pixels of {channels} channel{'s' if channels > 1 else ''}"


def read_extractor(name: str, path: Path, device: str | torch.device = "cpu") -> Extractor:
    """The classifier in a checkpoint of kind "extractor". UserError: missing, truncated or foreign file, or of another kind."""
    tensors, meta = load_file(path)
    if meta.get("kind") != "extractor":
        raise UserError(
            f"{path} holds a {meta.get('kind', 'foreign object')}, not a feature extractor",
            "`d2o train recipes/classifier_digits.yaml` makes one",
        )
    network = load_weights(meta["network"], tensors, path)
    if not isinstance(network, Classifier):
        raise UserError(f"{path}: a {type(network).__name__} has no features; an extractor is a classifier")
    return Extractor(name, network, file_sha256(path), device)


def _digits(device: str | torch.device) -> Extractor:
    path = asset("classifier_digits.safetensors")
    if not path.exists():
        raise UserError(
            "the weights of the extractor 'digits' are missing (d2o/assets/classifier_digits.safetensors)",
            "re-install d2o, or train them: d2o train recipes/classifier_digits.yaml, then --extractor PATH",
        )
    return read_extractor("digits", path, device)


EXTRACTORS: dict[str, Callable[[str | torch.device], Extractor]] = {"digits": _digits}
"""Name -> function of the device."""

DEFAULTS: dict[tuple[int, int, int], str] = {(1, 8, 8): "digits"}
"""Image shape -> extractor used when none is named."""


def extractor_names() -> list[str]:
    return sorted(EXTRACTORS)


def load_extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """A named extractor, or the path of an own classifier (.safetensors of kind "extractor").

    UserError: unknown name (with the list), absent weights, a file of another kind.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name](device)
    path = Path(name)
    if path.suffix != ".safetensors" and not path.exists():
        near = nearest(name, EXTRACTORS)
        raise UserError(
            f"unknown extractor {name!r}" + (f": did you mean {near!r}?" if near else ""),
            f"known: {', '.join(extractor_names())}; or the path of a classifier's .safetensors checkpoint",
        )
    extractor = read_extractor(path.stem, path, device)
    extractor.name = f"{path.stem}@{extractor.sha256[:6]}"  # an own network never passes for a shipped one of the same name
    return extractor


def default_extractor(shape: tuple[int, ...]) -> str:
    """The extractor for images of `shape` (C, H, W) when none is named. UserError where there is no default."""
    if shape not in DEFAULTS:
        raise UserError(
            f"no default feature extractor for images of {describe_shape(shape)}; name one with --extractor",
            f"known: {', '.join(extractor_names())}; or the path of a classifier's .safetensors checkpoint",
        )
    return DEFAULTS[shape]
