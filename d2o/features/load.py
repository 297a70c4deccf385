"""Features by name. Absent weights are an error that says what to fetch; nothing is ever substituted silently."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2o.errors import UserError, nearest, unknown
from d2o.features.base import Features
from d2o.interop.safetensors_io import read_meta

if TYPE_CHECKING:
    from d2o.features.backbone import Backbone

MODULES: dict[str, str] = {
    "digits": "classifier",
    "cifar16": "classifier",
    "inception": "inception",
    "vgg16": "vgg16",
    "vgg16_bn": "vgg16",
    "lite0": "lite0",
    "tf_efficientnet_lite0": "lite0",
    "tf_efficientnet_b0": "lite0",
    "deit": "deit",
    **{f"deit_{size}_distilled_patch16_224": "deit" for size in ("tiny", "small", "base")},
    "vit_base_patch16_224": "deit",
    **{f"dinov2_vit{size}14": "dinov2" for size in "sbl"},
    **{name: "clip" for name in ("clip", "clip-vit-b-32", "clip-vit-g-14")},
    "dreamsim": "dreamsim",
    **{f"lpips-{trunk}": "lpips" for trunk in ("alex", "vgg", "squeeze")},
    **{f"latent-lpips-{space}": "latent_vgg" for space in ("sd15", "sd21", "sdxl", "sd3", "flux")},
}
"""Name -> the module of d2o.features that loads it, imported when it is needed."""

BACKBONES = {
    **{name: "load" for name, module in MODULES.items() if module == "deit"},
    **{
        name: "load_as_backbone"
        for name in ("vgg16_bn", "digits", "cifar16", *(n for n, m in MODULES.items() if m == "lite0"))
    },
}
"""Of these, what serves as a `Backbone` of a projected critic -> the function of its module."""


def load_features(name: str, device: str | torch.device = "cpu", weights: Path | None = None) -> Features:
    """The features `name`, or those of the path of an own classifier or LatentLPIPS (.safetensors of kind "extractor"
    or "latent_lpips"). `weights`: their file, instead of the one that is found, downloaded or ships. On the meta
    device, for what a network costs, no published weights are looked for.

    UserError: unknown name (with the list), absent weights (with what to fetch), a file of another kind.
    """
    with torch.random.fork_rng(devices=[]):  # a network draws initial weights before it takes those of its file
        if name in MODULES:
            return importlib.import_module(f"d2o.features.{MODULES[name]}").load(name, weights, device)
        if is_latent_lpips(Path(name)):
            from d2o.features.latent_vgg import load_own

            return load_own(Path(name), device)[0]
        return own_classifier(name, device, MODULES)


def is_latent_lpips(path: Path) -> bool:
    """Is it a checkpoint of a distance between latents?"""
    return path.suffix == ".safetensors" and path.exists() and read_meta(path).get("kind") == "latent_lpips"


def own_classifier(name: str, device: str | torch.device, known: dict[str, str]) -> Features:
    """The classifier at the path `name`. UserError: no path either; a file of another kind."""
    from d2o.features.classifier import read_classifier

    path = Path(name)
    if path.suffix != ".safetensors" and not path.exists():
        near = nearest(name, known)
        raise UserError(
            f"unknown extractor {name!r}" + (f": did you mean {near!r}?" if near else ""),
            f"known: {', '.join(sorted(known))}; or the path of a classifier's .safetensors checkpoint",
        )
    features = read_classifier(path.stem, path, device)
    features.name = f"{path.stem}@{features.sha256[:6]}"  # never passes for a shipped one of the same name
    return features


def load_backbone(
    name: str, device: str | torch.device = "cpu", weights: Path | None = None, size: int = 224
) -> Backbone:
    """The backbone `name`, one of BACKBONES, prepared as the published projected critics do; `size` that images are
    resized to. Weights and errors as `load_features`."""
    if name not in BACKBONES:
        raise unknown("backbone", name, BACKBONES)
    with torch.random.fork_rng(devices=[]):
        module = importlib.import_module(f"d2o.features.{MODULES[name]}")
        return getattr(module, BACKBONES[name])(name, weights, device, size)
