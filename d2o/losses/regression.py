"""Distances between a student's output and the teacher's, per sample. x, y [B, C, H, W] -> [B]."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from d2o.losses.perceptual import enlarged


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean over C, H, W of (x - y)^2."""
    return (x - y).square().flatten(1).mean(1)


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean over C, H, W of |x - y|."""
    return (x - y).abs().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor, reduce: str = "vector") -> Tensor:
    """sqrt(|x - y|^2 + c^2) - c with c = 0.00054 sqrt(CHW) (Song & Dhariwal 2023, eq. 8): near L2 for small, L1 for
    large differences.

    `reduce` "vector": one norm over the whole difference; "element": the same per value, then the mean over C, H, W.
    """
    d = (x - y).flatten(1)
    c = 0.00054 * math.sqrt(d.shape[1])
    if reduce == "element":
        return ((d.square() + c**2).sqrt() - c).mean(1)
    return (d.square().sum(1) + c**2).sqrt() - c


LOSSES = {"mse": mse, "l1": l1, "pseudo_huber": pseudo_huber}


def distance(
    kind: str,
    x: Tensor,
    y: Tensor,
    huber_reduce: str = "vector",
    network: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """d(x, y) [B]: "l2" or "mse" (mean square), "l1" (mean absolute value), "pseudo_huber", or "lpips" by a
    network that takes two batches [B, 3, 224, 224] in [-1, 1]."""
    if kind == "lpips":
        assert network is not None
        return lpips(x, y, network)
    if kind == "pseudo_huber":
        return pseudo_huber(x, y, huber_reduce)
    return LOSSES["mse" if kind == "l2" else kind](x, y)


def lpips(x: Tensor, y: Tensor, network: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """LPIPS of images [B, 1 or 3, H, W] in [-1, 1], resized to 224 x 224 as Song et al. 2023 do. [B]."""
    return network(enlarged(x), enlarged(y))
