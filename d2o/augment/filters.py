"""Wavelet filters of ADA as matrices: resampling by two (sym6), and amplification of octave bands (sym2).

Every filter here acts along one axis, with the image continued by reflection (about the centres of its edge pixels).
That is a linear map from pixels to pixels, so it is held as a matrix: exact at any image size, differentiable any
number of times, and quick on every device.
Wavelets: Daubechies 1988. Bands: Karras et al. 2020 (ADA), appendix B.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SYM2 = np.array([1 + math.sqrt(3), 3 + math.sqrt(3), 3 - math.sqrt(3), 1 - math.sqrt(3)]) / (4 * math.sqrt(2))
# The least asymmetric wavelet with six vanishing moments; the tests verify the relations that define it.
SYM6 = np.array(
    [
        0.015404109327027373,
        0.0034907120842174702,
        -0.11799011114819057,
        -0.048311742585633,
        0.4910559419267466,
        0.787641141030194,
        0.3379294217276218,
        -0.07263752278646252,
        -0.021060292512300564,
        0.04472490177066578,
        0.0017677118642428036,
        -0.007800708325034148,
    ]
)
"""Orthonormal low-pass filters: sum h = sqrt(2), sum_n h[n] h[n + 2k] = 1 if k = 0, else 0."""

MIDDLE = 5
"""Pixel n is tap h[MIDDLE] of fine sample 2n, so sample m lies at pixel m / 2: about this tap sym6 is closest to a
symmetric filter, to 0.1 samples (measured on photographs: turned images are nearest to the exact ones with this
middle)."""

_on_device: dict[tuple[str, int, str, torch.dtype], Tensor] = {}


def matrix(kind: str, size: int, like: Tensor) -> Tensor:
    """The matrix of that kind for rows of `size` pixels, with the type and device of `like`. Copied there once, so that
    no later call waits.

    "up" [2 size + 10, size]: to the fine samples m = -5 .. 2 size + 4, which "down" [size, 2 size + 10] reads. "bands"
    [4, size, size]: the octave bands [0, pi/8], [pi/8, pi/4], [pi/4, pi/2], [pi/2, pi].
    """
    key = (kind, size, str(like.device), like.dtype)
    if key not in _on_device:
        with torch.inference_mode(False):  # an inference tensor could not take part in a later training step
            _on_device[key] = torch.from_numpy(_MATRICES[kind](size)).to(like.device, like.dtype)
    return _on_device[key]


def reflected(x: Tensor, size: int) -> Tensor:
    """Positions x, in pixels, brought into [0, size - 1] by reflections about the centres of the edge pixels."""
    last = size - 1
    return last - (x.remainder(2 * last) - last).abs()


def band_filters() -> list[np.ndarray]:
    """The four band-pass filters [43], symmetric about their middle, which add up to the identity.

    With P(z) = H(z) H(1/z) / 2, the half-band filter of sym2, and Q = 1 - P: P(z)P(z^2)P(z^4), P(z)P(z^2)Q(z^4),
    P(z)Q(z^2), Q(z).
    """
    low = np.convolve(SYM2, SYM2[::-1]) / 2
    high = -low
    high[3] += 1
    products = {
        1: _spread(high, 1),
        2: np.convolve(low, _spread(high, 2)),
        3: np.convolve(np.convolve(low, _spread(low, 2)), _spread(high, 4)),
    }
    products[4] = np.convolve(np.convolve(low, _spread(low, 2)), _spread(low, 4))
    return [np.pad(products[level], (43 - len(products[level])) // 2) for level in (4, 3, 2, 1)]


def _spread(h: np.ndarray, factor: int) -> np.ndarray:
    """h(z^factor)"""
    out = np.zeros((len(h) - 1) * factor + 1)
    out[::factor] = h
    return out


def _rows(taps: list[tuple[np.ndarray, np.ndarray, float]], shape: tuple[int, int]) -> np.ndarray:
    """A matrix from (row numbers, the unlimited pixel each row reads, weight), the pixels being reflected into it."""
    out, last = np.zeros(shape), shape[1] - 1
    for row, pixel, weight in taps:
        np.add.at(out, (row, last - np.abs(pixel % (2 * last) - last)), weight)
    return out


@lru_cache(8)
def _up(size: int) -> np.ndarray:
    m = np.arange(2 * size + 10) - MIDDLE
    taps = []
    for k, weight in enumerate(SYM6):
        mine = m[(m + MIDDLE - k) % 2 == 0]
        taps.append((mine + MIDDLE, (mine + MIDDLE - k) // 2, math.sqrt(2) * weight))
    return _rows(taps, (2 * size + 10, size))


@lru_cache(8)
def _down(size: int) -> np.ndarray:
    out = np.zeros((size, 2 * size + 10))
    for n in range(size):
        out[n, 2 * n : 2 * n + 12] = SYM6 / math.sqrt(2)  # sample m is column m + MIDDLE
    return out


@lru_cache(8)
def _bands(size: int) -> np.ndarray:
    n = np.arange(size)
    return np.stack(
        [_rows([(n, n + k - 21, weight) for k, weight in enumerate(h)], (size, size)) for h in band_filters()]
    )


_MATRICES = {"up": _up, "down": _down, "bands": _bands}


def amplify(images: Tensor, gains: Tensor) -> Tensor:
    """images [B, C, R, R] with each octave band scaled, along both axes: gains [B, 4], coarse first."""
    rows = torch.einsum("bk,kij->bij", gains.to(images.dtype), matrix("bands", images.shape[-1], images))[:, None]
    return rows @ images @ rows.mT
