"""Triplets whose order is known, without people: two copies of a digit distorted in one way, by different strengths.

Each copy is also moved, by up to three pixels of 32 (less than one of the original's eight), which says nothing of the
order: whoever reads the digit does not mind, and differences of pixels or latents do. Strengths are in [0, 1], 1 being
that of `STRONGEST`; those of two copies differ by `LEAST` or more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from d2o.data.images import open_images
from d2o.errors import UserError, unknown

MADE = ("real:digits-2afc/a", "real:digits-2afc/b")
"""Of the halves of scikit-learn's digits."""
LEAST = 0.1
MOVE = 3 / 32
"""Of the side: how far each copy is moved at most, in each direction."""
SIDE = 32

Distort = Callable[[np.ndarray, float, np.random.Generator, np.ndarray], np.ndarray]


def noise(x: np.ndarray, strength: float, random: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """Normal noise on every pixel, with a standard deviation of up to 0.8 of the range."""
    return x + 0.8 * strength * random.standard_normal(x.shape)


def blur(x: np.ndarray, strength: float, random: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """A normal kernel of a standard deviation of up to 3 pixels of 32."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, 3 * strength * len(x) / SIDE, mode="nearest")


def erase(x: np.ndarray, strength: float, random: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """A square of up to half the side becomes black, around a pixel of the digit's own."""
    rows, columns = np.nonzero(x > 0.5 * x.max())
    pick, half = random.integers(len(rows)), strength * len(x) / 4
    row, column = np.ogrid[: x.shape[0], : x.shape[1]]
    return np.where((abs(row - rows[pick]) <= half) & (abs(column - columns[pick]) <= half), 0.0, x)


def blend(x: np.ndarray, strength: float, random: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """Up to 0.7 of another digit."""
    return (1 - 0.7 * strength) * x + 0.7 * strength * other


STRONGEST: dict[str, Distort] = {"noise": noise, "blur": blur, "erase": erase, "blend": blend}
"""Kind of distortion -> what it does."""


def distorted(x: np.ndarray, kind: str, strength: float, random: np.random.Generator, other: np.ndarray) -> np.ndarray:
    """A copy of the grey image x [H, W] in [0, 1]: distorted, and moved. `other`: the digit that "blend" takes."""
    from scipy.ndimage import shift

    y = STRONGEST[kind](x, strength, random, other)
    return shift(y, random.uniform(-MOVE, MOVE, 2) * len(x), order=1, mode="nearest").clip(0, 1)


def made_triplets(
    path: str, resolution: int | None, channels: int | None, limit: int | None = None, seed: int = 0
) -> list[tuple[str, list[Tensor], Tensor]]:
    """Of each kind its name, (reference, first, second copy) uint8 [n, C, H, W] each and whether the second is nearer
    (float32 [n], 0 or 1): one triplet of each kind for every digit of the half, or the first `limit`. `seed`: of the
    distortions; training has 0. UserError: no made set, or images in grey and colour."""
    if path not in MADE:
        raise unknown("made set of triplets", path, MADE)
    digits = open_images(f"real:digits/{path[-1]}", resolution=resolution or SIDE, channels=1)
    if digits.labels is None:
        raise UserError(f"{path} needs the digits' labels")
    n = min(limit or len(digits), len(digits))
    grey, labels = digits.images(range(len(digits)))[:, 0].numpy() / 255.0, digits.labels.numpy()
    found = []
    for number, kind in enumerate(STRONGEST):
        sides = np.empty((3, n, *grey.shape[1:]))
        nearer = np.empty(n, np.float32)
        for i in range(n):
            own = [ord(path[-1]), number, i]
            random = np.random.default_rng(own if seed == 0 else [*own, seed])  # of this triplet alone
            other = grey[random.choice(np.flatnonzero(labels != labels[i]))]
            weak = random.uniform(0, 1 - LEAST)
            strengths = [weak, random.uniform(weak + LEAST, 1)]
            second = int(random.integers(2))  # whether the second copy is the nearer one
            strengths = strengths[::-1] if second else strengths
            sides[0, i] = grey[i]
            for k, strength in enumerate(strengths, start=1):
                sides[k, i] = distorted(grey[i], kind, strength, random, other)
            nearer[i] = second
        pixels = torch.from_numpy(np.round(sides * 255).astype(np.uint8))[:, :, None]
        pixels = pixels.expand(-1, -1, channels or 1, -1, -1).contiguous()
        found.append((kind, list(pixels), torch.from_numpy(nearer)))
    return found
