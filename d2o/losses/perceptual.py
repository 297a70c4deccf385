"""Perceptual distances over the maps of frozen networks; LPIPS among them (Zhang et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.features.base import Features
from d2o.features.load import load_features
from d2o.features.lpips import LpipsFeatures
from d2o.features.lpips import load as load_trunk
from d2o.spaces.base import LatentSpace

Maps = Callable[[Tensor], list[Tensor]]
Trunk = Literal["alex", "vgg", "squeeze"]
SIZE = 224
"""Pixels at which Song et al. 2023 and Yin et al. 2024 take LPIPS of smaller images."""
EPS = 1e-8
TINY = 1e-20
"""For which `unit` is the package's division by |f| + 1e-10, and has a gradient where f is 0."""


class Target:
    """What several are compared with: y [B, C, H, W], and its normalised maps, which are computed once, without
    gradients, when they are first asked for."""

    def __init__(self, y: Tensor, maps: Maps, eps: float = EPS):
        self.y, self._maps, self._eps = y.detach(), maps, eps

    @cached_property
    def units(self) -> list[Tensor]:
        with torch.no_grad():
            return [unit(single(f), self._eps) for f in self._maps(self.y)]


def perceptual(
    x: Tensor, y: Tensor | Target, maps: Maps, weights: Sequence[Tensor] | None = None, eps: float = EPS
) -> Tensor:
    """Sum over the maps of the squared distance between channel-normalised features, averaged over positions (Zhang et
    al. 2018, eq. 1). x, y [B, C, H, W], what `maps` takes (`Features.maps`: images in [-1, 1]) -> [B]; gradients flow
    to both.

    `weights`: of each map's channels [c], calibrated as LPIPS' are; None: all 1. y may be a `Target` of the same maps
    and eps.
    """
    total = single(x.new_zeros(len(x)))
    units = y.units if isinstance(y, Target) else (unit(single(g), eps) for g in maps(y))
    for k, (f, g) in enumerate(zip(maps(x), units, strict=True)):
        square = (unit(single(f), eps) - g).square()
        if weights is not None:
            square = square * weights[k][:, None, None]
        total = total + square.sum(1).flatten(1).mean(1)
    return total


def single(f: Tensor) -> Tensor:
    """In single precision at least."""
    return f.to(torch.promote_types(f.dtype, torch.float32))


def unit(f: Tensor, eps: float = EPS) -> Tensor:
    """Features [B, C, H, W] scaled to length one over C at every position."""
    return f / (f.square().sum(1, keepdim=True) + eps).sqrt()


class Perceptual(nn.Module):
    """`perceptual` over the maps of any features: (a, b) -> [B]; gradients flow to both. Frozen, and in no state dict.

    Takes images [B, 1 or 3, H, W] in [-1, 1], resized to `size` x `size` first (bilinear; None: at their own size), or
    with a `space` its latents, as the diffusion model sees them, through its decoder.
    """

    eps = EPS

    def __init__(self, features: Features, size: int | None = None, space: LatentSpace | None = None):
        super().__init__()
        self.features, self.size, self.space = features, size, space

    @property
    def weights(self) -> Sequence[Tensor] | None:
        return None

    def forward(self, a: Tensor, b: Tensor | Target) -> Tensor:
        """b may be what `target` made of it. UserError: a shape that the features do not take."""
        return perceptual(a, b, self.maps, self.weights, self.eps)

    def target(self, b: Tensor) -> Target:
        """b for several comparisons, decoded and looked at once."""
        return Target(b, self.maps, self.eps)

    def maps(self, x: Tensor) -> list[Tensor]:
        images = x if self.space is None else self.space.pixels(x)
        return self.features.maps(images if self.size is None else resized(images, self.size))


class LPIPS(Perceptual):
    """LPIPS v0.1, the distance of the package `lpips` with its linear heads."""

    eps = TINY
    features: LpipsFeatures

    @property
    def weights(self) -> Sequence[Tensor]:
        return self.features.weights


def load_lpips(
    device: str | torch.device = "cpu",
    trunk: Trunk = "vgg",
    pooling: Literal["max", "avg"] = "max",
    weights: Path | None = None,
    size: int | None = None,
    space: LatentSpace | None = None,
) -> LPIPS:
    """LPIPS over a trunk, `size` and `space` as `Perceptual`'s. `pooling` "max" as the trunks were trained, or "avg"
    over the same windows, as Song et al. 2023 have it for VGG. `weights`: torchvision's file of the trunk; None: it is
    looked for, but not for the meta device. UserError: none to be had, or another network's; lpips is not
    installed."""
    features = load_trunk(f"lpips-{trunk}", weights, device)
    return LPIPS(features.pool_by_average() if pooling == "avg" else features, size, space)


def load_perceptual(
    name: str,
    device: str | torch.device = "cpu",
    weights: Path | None = None,
    size: int | None = None,
    space: LatentSpace | None = None,
) -> Perceptual:
    """The distance over the features `name`, with LPIPS' calibrated weights for those of its trunks ("lpips-vgg").
    `size`: features that resize by themselves (lite0: to 224) do so to this size, others are given images of it. Rest
    and UserError as `load_features`."""
    features = load_features(name, device, weights)
    if size is not None and features.size is not None:
        features.size, size = size, None
    return LPIPS(features, size, space) if isinstance(features, LpipsFeatures) else Perceptual(features, size, space)


def resized(images: Tensor, size: int) -> Tensor:
    """Images [B, C, H, W] -> [B, C, size, size], bilinear."""
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def enlarged(images: Tensor) -> Tensor:
    """Images in colour and of 224 px, VGG's size: [B, 1 or 3, H, W] -> [B, 3, 224, 224]."""
    return resized(images.expand(-1, 3, -1, -1), SIZE)
