"""Distances between a student's output and the teacher's, per sample. x, y [B, C, H, W] -> [B]."""

from __future__ import annotations

import math

from torch import Tensor


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
