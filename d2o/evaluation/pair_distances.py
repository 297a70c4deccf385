"""The perceptual distances of an evaluation by name, between two images or latents of equal noise: LPIPS (Zhang et al.
2018), LatentLPIPS (Kang et al. 2024)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from d2o.data.images import to_float
from d2o.errors import UserError, unknown
from d2o.evaluation.extractor import Device
from d2o.features.lpips import LEAST, TITLES
from d2o.losses.latent_lpips import RELEASED, SHIPPED, load_latent_lpips
from d2o.losses.perceptual import Trunk, load_lpips

AT_ONCE = 16  # pairs in one pass of the network, which bounds its memory


class PairDistance(ABC):
    """A frozen distance between the members of a pair. Always float32, without TF32, in eval mode; deterministic.

    `name` for results, `label` for tables; `sha256` of the weights file; `space`: what it compares, "pixel" (uint8
    images) or "latent" (latents as the diffusion model sees them).
    """

    better = "lower"

    def __init__(self, name: str, label: str, sha256: str, space: Literal["pixel", "latent"], device: Device = "cpu"):
        self.name, self.label, self.sha256, self.space, self.device = name, label, sha256, space, torch.device(device)

    @abstractmethod
    def run(self, a: Tensor, b: Tensor) -> Tensor:
        """A few pairs on the device, float32: images [n, 3, H, W] in [-1, 1], or latents [n, C, h, w] -> [n]. Called in
        inference mode."""

    def check(self, height: int, width: int) -> None:
        """UserError: images of this size are too small for the network."""
        return

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Pairs on any device: uint8 images [n, C, H, W] with C 1 (grey is repeated) or 3, or latents [n, C, h, w] ->
        [n] float32 on the device.

        UserError: the members of the pairs differ in shape, or the network does not take their shape.
        """
        if a.shape != b.shape:
            raise UserError(f"{self.label} compares pairs of one shape; these are {[*a.shape]} and {[*b.shape]}")
        if self.space == "pixel":
            if a.dtype != torch.uint8 or b.dtype != torch.uint8:
                raise TypeError(f"{self.label} is taken of uint8 images, not {a.dtype} and {b.dtype}")
            if a.shape[1] not in (1, 3):
                raise UserError(f"{self.label} takes images of 1 or 3 channels; these have {a.shape[1]}")
        self.check(*a.shape[2:])
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return torch.cat(
                [
                    self.run(self._prepare(x), self._prepare(y))
                    for x, y in zip(a.split(AT_ONCE), b.split(AT_ONCE), strict=True)
                ]
            )

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.to(self.device)
        return to_float(x.expand(-1, 3, -1, -1)) if self.space == "pixel" else x.float()


class LpipsDistance(PairDistance):
    """LPIPS v0.1 as the package `lpips` computes it, with its linear heads, at the images' own size."""

    def __init__(self, trunk: Trunk, weights: Path | None = None, device: Device = "cpu"):
        """`weights`: torchvision's file of the trunk; None: it is looked for. UserError: not there, or another
        network's."""
        self.network = load_lpips(device, trunk, weights=weights)
        super().__init__(f"lpips-{trunk}", f"LPIPS ({TITLES[trunk]})", self.network.features.sha256, "pixel", device)
        self.trunk = trunk

    def check(self, height: int, width: int) -> None:
        least = LEAST[self.trunk]
        if min(height, width) < least:
            hint = (
                "its poolings leave nothing of smaller ones"
                if self.trunk == "vgg"
                else "lpips-vgg takes 16x16 and more"
            )
            raise UserError(
                f"{self.label} needs images of at least {least}x{least} pixels; these are {width}x{height}", hint
            )

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network(a, b)


class LatentDistance(PairDistance):
    """LatentLPIPS, without the L1 term and without augmentation."""

    def __init__(self, space: str, weights: Path | None = None, device: Device = "cpu"):
        """`weights`: the released "tuned" file, or one of d2o's own; None: it is looked for. UserError: not there, or
        another space's."""
        self.network = load_latent_lpips(space, weights, device=device)
        sha256 = self.network.features.sha256
        super().__init__(f"latent-lpips-{space}", f"LatentLPIPS ({space})", sha256, "latent", device)

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network(a, b)


PAIR_DISTANCES: dict[str, Callable[[Path | None, Device], PairDistance]] = {
    "lpips": partial(LpipsDistance, "alex"),
    "lpips-alex": partial(LpipsDistance, "alex"),
    "lpips-vgg": partial(LpipsDistance, "vgg"),
    **{f"latent-lpips-{space}": partial(LatentDistance, space) for space in (*RELEASED, *SHIPPED)},
}


def load_pair_distance(name: str, weights: Path | None = None, device: Device = "cpu") -> PairDistance:
    """The distance `name` (a key of `PAIR_DISTANCES`) with the weights in a file, or where `find_weights` finds them.

    UserError: unknown name; weights that are nowhere (it says where to get them) or do not fit.
    """
    if name not in PAIR_DISTANCES:
        raise unknown("distance", name, PAIR_DISTANCES)
    return PAIR_DISTANCES[name](weights, device)
