"""The network of LatentLPIPS (Kang et al. 2024, section 3.2) as features of latents."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from d2o.features.base import Features, placed
from d2o.features.common import filled
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import WEIGHTS
from d2o.networks.fill import fill_network
from d2o.networks.latent_vgg import STAGES, LatentVGG

NAMES = tuple(name for name in WEIGHTS if name.startswith("latent-lpips-"))
LEAST = 4
"""The smallest side of the latents."""


class LatentVggFeatures(Features):
    """Takes latents as the diffusion model sees them, in place of images in [-1, 1]. Maps: the five of LatentLPIPS.
    Vector: the mean over places of the last."""

    network: LatentVGG

    def __init__(self, name: str, network: LatentVGG, sha256: str = ""):
        super().__init__(name, network, STAGES[-1][0], sha256, least=LEAST, takes=(network.channels,))

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def taps(self, x: Tensor) -> list[Tensor]:
        return self.network(x)

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"features": self.taps(x)[-1].mean((2, 3))}


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The features `name` of NAMES with the released "tuned" file; None: it is looked for. UserError: not there, or
    another network's."""
    channels = 16 if name.removeprefix("latent-lpips-") in ("sd3", "flux") else 4
    network, sha256 = filled(name, partial(LatentVGG, channels), partial(read_trunk, channels), weights, device)
    return placed(LatentVggFeatures(name, network, sha256), device)


def read_trunk(channels: int, path: Path) -> LatentVGG:
    """The trunk alone of a released file, which also holds the heads of the distance."""
    tensors = {name.removeprefix("net."): t for name, t in read_tensors(path).items() if name.startswith("net.")}
    return fill_network(LatentVGG(channels), tensors, path).eval().requires_grad_(False)
