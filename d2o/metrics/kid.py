"""Kernel Inception Distance: the squared maximum mean discrepancy of two sets of features, under a polynomial
kernel."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2o.errors import UserError, unknown

ORDERS = ("torch_fidelity", "clean_fid")


class Kid(NamedTuple):
    """Mean and standard deviation (population) over `subsets` draws of `size` images from each set. Unbiased, so it may
    fall below 0."""

    mean: float
    std: float
    subsets: int
    size: int


def kid(
    x: Tensor,
    y: Tensor,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
    order: str = "torch_fidelity",
    *,
    cap: bool = False,
) -> Kid:
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, section 4) of features x [n, d] and y [m,
    d], of any float type.

    Each subset is drawn without replacement by numpy's RandomState(seed), x before y with order "torch_fidelity", y
    before x with "clean_fid" (which seeds nothing itself: equal after np.random.seed(seed)). `cap`: lower `size` to the
    smaller set, as clean-fid does.
    UserError: subsets larger than a set, values that are not finite, different dimensions, unknown order.
    """
    if order not in ORDERS:
        raise unknown("order of draws", order, ORDERS)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(
            f"features of different dimensions: {tuple(x.shape)} and {tuple(y.shape)}",
            "both must come from the same feature extractor",
        )
    smaller = min(len(x), len(y))
    size = min(size, smaller) if cap else size
    if size > smaller:
        raise UserError(
            f"KID subset size {size} > {smaller} images (the sets hold {len(x)} and {len(y)})",
            f"give --kid-size {smaller} or less, or more images",
        )
    if size < 2 or subsets < 1:
        raise UserError(f"KID needs at least 1 subset of at least 2 images, not {subsets} of {size}")
    a, b = _array(x), _array(y)
    draw = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        if order == "torch_fidelity":
            rows_a = draw.choice(len(a), size, replace=False)
            rows_b = draw.choice(len(b), size, replace=False)
        else:
            rows_b = draw.choice(len(b), size, replace=False)
            rows_a = draw.choice(len(a), size, replace=False)
        values[i] = _mmd2(a[rows_a], b[rows_b])
    return Kid(float(values.mean()), float(values.std()), subsets, size)


def _mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Of x and y [m, d]: the mean kernel within each set, pairs of an image with itself left out, less twice the mean
    across."""
    m = len(x)
    within = 0.0
    for z in (x, y):
        k = _kernel(z, z)
        within += float(k.sum(dtype=np.float64) - np.trace(k, dtype=np.float64))
    return within / (m * (m - 1)) - 2 * float(_kernel(x, y).mean(dtype=np.float64))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    k = x @ y.T
    k /= x.shape[1]
    k += 1
    return k * k * k


def _array(x: Tensor) -> np.ndarray:
    """float64 stays, everything else becomes float32 (sums of the kernel are in float64: the result then differs by
    some 1e-9)."""
    array = x.detach().cpu().to(torch.float64 if x.dtype == torch.float64 else torch.float32).numpy()
    if not np.isfinite(array).all():
        raise UserError(
            "the features hold values that are not finite", "the extractor's weights or the images are damaged"
        )
    return array
