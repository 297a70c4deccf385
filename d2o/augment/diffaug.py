"""DiffAugment (Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training"): colour, translation
and cutout of every image that a critic sees, real or made.

What is drawn is an argument of each operation, so that the numbers of others can be repeated; `diffaugment` draws for
each sample by itself. Differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from d2o.errors import unknown

POLICIES = ("color", "translation", "cutout")
SHIFT, CUT = 0.125, 0.2
"""Of a side: the farthest shift, and the rectangle that is cut out."""


class SampleDraws(Protocol):
    """Random numbers of a batch's samples, [B, *shape], as `d2o.methods.base.Draws` gives them."""

    def rand(self, *shape: int) -> Tensor: ...

    def randint(self, low: int, high: int, *shape: int) -> Tensor: ...


def diffaugment(x: Tensor, draws: SampleDraws, policies: Collection[str] = POLICIES) -> Tensor:
    """Images x [B, C, H, W] in [-1, 1] with those of `POLICIES`, in that order; not limited to [-1, 1] afterwards.

    Brightness + U(-0.5, 0.5), saturation times U(0, 2), contrast times U(0.5, 1.5); a shift of up to an eighth of the
    side, in whole pixels; a rectangle of a fifth of the sides set to 0, its centre anywhere. UserError: another policy.
    """
    for policy in policies:
        if policy not in POLICIES:
            raise unknown("policy of DiffAugment", policy, POLICIES)
    height, width = x.shape[2:]
    if "color" in policies:
        u = draws.rand(3).to(x.dtype)
        x = contrast(saturation(brightness(x, u[:, 0]), u[:, 1]), u[:, 2])
    if "translation" in policies:
        far = [length_of(SHIFT, side) for side in (height, width)]
        x = translation(x, *(draws.randint(-most, most + 1) for most in far))
    if "cutout" in policies:
        ends = [side + 1 - length_of(CUT, side) % 2 for side in (height, width)]  # an even one lies between pixels
        x = cutout(x, *(draws.randint(0, end) for end in ends))
    return x


def length_of(share: float, side: int) -> int:
    """That share of a side in whole pixels."""
    return int(share * side + 0.5)


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """x [B, C, H, W] + (u - 0.5), u [B] in [0, 1)."""
    return x + (u - 0.5)[:, None, None, None]


def saturation(x: Tensor, u: Tensor) -> Tensor:
    """Away from the grey image, the mean of the channels, times 2 u, u [B] in [0, 1)."""
    grey = x.mean(1, keepdim=True)
    return grey + (x - grey) * (2 * u)[:, None, None, None]


def contrast(x: Tensor, u: Tensor) -> Tensor:
    """Away from each image's mean, times u + 0.5, u [B] in [0, 1)."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (u + 0.5)[:, None, None, None]


def translation(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Row r and column c are those of r + rows and c + columns, 0 outside of the image; rows, columns [B] integers."""
    down, right = (
        (torch.arange(side, device=x.device) + shift.to(x.device, torch.int64)[:, None] + 1).clamp(0, side + 1)
        for side, shift in zip(x.shape[2:], (rows, columns))
    )
    framed, sample = F.pad(x, (1, 1, 1, 1)), torch.arange(len(x), device=x.device)
    moved = framed.permute(0, 2, 3, 1)[sample[:, None, None], down[:, :, None], right[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def cutout(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows [offset - size // 2, offset - size // 2 + size) and such columns are 0, as far as the image goes; size a
    fifth of that side, offsets rows, columns [B] integers."""
    down, right = (_within(side, offset.to(x.device)) for side, offset in zip(x.shape[2:], (rows, columns)))
    return x * ~(down[:, None, :, None] & right[:, None, None, :])


def _within(side: int, offset: Tensor) -> Tensor:
    """Which places of a side are cut out, [B, side]."""
    size = length_of(CUT, side)
    place, first = torch.arange(side, device=offset.device), (offset - size // 2)[:, None]
    return (place >= first) & (place < first + size)
