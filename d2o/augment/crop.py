"""Crops for classification: of random place, size and shape in training, of the centre in validation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

RATIO = 4 / 3
"""Largest quotient of a crop's sides, and 1 / the smallest."""


def random_crops(x: Tensor, numbers: Tensor, size: int, scale: tuple[float, float], flip: bool) -> Tensor:
    """Images [n, C, H, W] -> [n, C, size, size]: of each a rectangle of a share of its area uniform in `scale`, with a
    quotient of sides log-uniform in [3/4, 4/3], at a uniform place, mirrored by a coin (`flip`), read bilinearly.
    `numbers` [n, 5]: uniform in [0, 1)."""
    area = scale[0] + (scale[1] - scale[0]) * numbers[:, 0]
    ratio = torch.exp((2 * numbers[:, 1] - 1) * math.log(RATIO))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    # grid_sample's coordinates go from -1 to 1: a rectangle of that part of the side may move by what is left.
    centre_x, centre_y = (2 * numbers[:, 2] - 1) * (1 - width), (2 * numbers[:, 3] - 1) * (1 - height)
    sign = torch.where(numbers[:, 4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(width)
    zero = torch.zeros_like(width)
    rows = [torch.stack([sign * width, zero, centre_x], 1), torch.stack([zero, height, centre_y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def centre_crops(x: Tensor, size: int) -> Tensor:
    """Images [n, C, H, W] with H and W of at least `size` -> [n, C, size, size]."""
    top, left = (x.shape[2] - size) // 2, (x.shape[3] - size) // 2
    return x[:, :, top : top + size, left : left + size]
