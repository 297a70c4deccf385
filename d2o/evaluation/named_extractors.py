"""Features as the evaluation asks for them: of 8-bit images, resized as published numbers have it, by name.

Absent weights are an error that says what to fetch; nothing is ever substituted silently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from d2o.errors import UserError
from d2o.evaluation.extractor import Device, Extractor
from d2o.evaluation.resizing import clean_pil, clean_torch, clip_input, rounded_bicubic, torch_bilinear
from d2o.features import clip, dreamsim
from d2o.features.base import Features, describe_shape
from d2o.features.common import at_once
from d2o.features.inception import SIZE, centred
from d2o.features.load import load_features, own_classifier

Prepare = Callable[[Tensor, torch.device], Tensor]
"""uint8 images [n, 3, h, w] on any device -> what the network takes, on the device."""


class FeatureExtractor(Extractor):
    """The 8-bit protocol around features. `prepare`, described by `resize`, is how a published number comes to the
    network's size, whatever theirs is; None: as the features themselves do. `whole`: a batch goes through in one
    piece."""

    def __init__(
        self,
        name: str,
        network: Features,
        device: Device = "cpu",
        *,
        prepare: Prepare | None = None,
        resize: str = "",
        whole: bool = False,
    ):
        super().__init__(
            name,
            network.dim,
            network.sha256,
            device,
            shape=network.shape if prepare is None else None,
            resize=resize or network.resize,
            classes=network.classes,
            outputs=network.has,
        )
        self.network, self.whole, self.own = network, whole, prepare

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images [n, C, h, w] -> what the network takes."""
        if self.own is not None:
            return self.own(images, self.device)
        return self.network.from_pixels(images.to(self.device).to(torch.float32))

    def run(self, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        parts = [images] if self.whole else images.split(at_once(self.device))
        found = [self.network.outputs(self.prepare(part), wanted) for part in parts]
        return found[0] if len(found) == 1 else {name: torch.cat([part[name] for part in found]) for name in wanted}


@dataclass(frozen=True)
class Way:
    """How an extractor of a name of its own comes to be: the features behind it, and how images come to them."""

    features: str
    prepare: Prepare | None = None
    resize: str = ""


def _clean_fid(images: Tensor, device: torch.device) -> Tensor:
    return centred(clean_pil(images, SIZE).to(device))


def _clean_fid_torch(images: Tensor, device: torch.device) -> Tensor:
    return centred(clean_torch(images.to(device), SIZE))


def _pytorch_fid(images: Tensor, device: torch.device) -> Tensor:
    return torch_bilinear(images.to(device).to(torch.float32).div_(255), SIZE).mul_(2).sub_(1)


def _openai(images: Tensor, device: torch.device) -> Tensor:
    return clip_input(images).to(device)


def _digits_area(images: Tensor, device: torch.device) -> Tensor:
    grey = images.to(device, torch.float32).mean(1, keepdim=True)
    return F.interpolate(grey, (8, 8), mode="area").round() / 127.5 - 1


def _dreamsim(images: Tensor, device: torch.device) -> Tensor:
    return rounded_bicubic(images.to(device), dreamsim.SIZE) / 255


WAYS: dict[str, Way] = {
    "inception": Way("inception"),  # torch-fidelity; the evaluations of EDM, StyleGAN and ADM
    "inception-tf": Way("inception"),  # the same, in full
    "inception-clean": Way("inception", _clean_fid, f"clean_pil{SIZE}"),  # clean-fid
    "inception-clean_torch": Way("inception", _clean_fid_torch, f"clean_torch{SIZE}"),
    "inception-legacy_pytorch": Way("inception", _pytorch_fid, f"torch_bilinear{SIZE}"),  # pytorch-fid
    **{name: Way(name) for name in ("dinov2_vitl14", "dinov2_vitb14", "dinov2_vits14")},
    **{
        name: Way(name, _openai, f"pil_bicubic{clip.SIZE}+center_crop")
        for name in ("clip", "clip-vit-b-32", "clip-vit-g-14")
    },
    "vgg16-fc2": Way("vgg16"),
    "lite0": Way("lite0"),
    "dreamsim": Way("dreamsim", _dreamsim),
    "digits-area": Way("digits", _digits_area, "grey+area8"),  # of images of digits in any size
}
SHORT = {"inception-tf": "inception", "clip": "clip-vit-b-32"}
"""Names that results state as another."""


def _by_way(name: str, weights: Path | None, device: Device) -> Extractor:
    way = WAYS[name]
    network = load_features(way.features, device, weights)
    return FeatureExtractor(SHORT.get(name, name), network, device, prepare=way.prepare, resize=way.resize)


def read_extractor(name: str, path: Path, device: Device = "cpu") -> Extractor:
    """The classifier of d2o's own in a file, as an extractor. UserError: none, or as `read_classifier`."""
    from d2o.features.classifier import read_classifier

    return FeatureExtractor(name, read_classifier(name, path, device), device, whole=True)


def _classifier(name: str, weights: Path | None, device: Device) -> Extractor:
    return FeatureExtractor(name, load_features(name, device, weights), device, whole=True)


EXTRACTORS: dict[str, Callable[[str, Path | None, Device], Extractor]] = {
    "digits": _classifier,
    "cifar16": _classifier,
    **dict.fromkeys(WAYS, _by_way),
}
"""Name -> function of (name, weights file or None, device)."""

DEFAULTS: dict[tuple[int, int, int], str] = {(1, 8, 8): "digits"}
"""Image shape -> extractor used when none is named."""
JUDGES_OF = {"cifar16": "cifar16"}
"""Teacher -> the same for its own images and its distillates'."""
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
    with torch.random.fork_rng(devices=[]):  # a network draws initial weights before it takes those of its file
        if name in EXTRACTORS:
            return EXTRACTORS[name](name, weights, device)
        network = own_classifier(name, device, dict.fromkeys(EXTRACTORS, ""))
    return FeatureExtractor(network.name, network, device, whole=True)


def default_extractor(shape: tuple[int, ...], teacher: str | None = None) -> str:
    """The extractor for images of `shape` (C, H, W), made by `teacher` or a distillate of it (None: by neither), when
    none is named. UserError where there is no default."""
    if teacher in JUDGES_OF:
        return JUDGES_OF[teacher]
    if shape in DEFAULTS:
        return DEFAULTS[shape]
    if shape[0] == 3 and min(shape[1:]) >= SMALLEST:
        return NATURAL
    raise UserError(
        f"no default feature extractor for images of {describe_shape(shape)}; name one with --extractor",
        f"known: {', '.join(extractor_names())}; or the path of a classifier's .safetensors checkpoint",
    )
