"""Fréchet distance between two Gaussians, and the streaming mean and covariance that it compares. Everything in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2o.errors import UserError

TRACE_METHOD = "eigh"


def frechet_distance(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), the squared 2-Wasserstein distance of N(mu1, S1) and N(mu2, S2) (what FID is).

    mu [d], sigma [d, d], numpy arrays or torch tensors of any float type, n - 1 covariances. Symmetric, never negative, exact also where
    n <= d. UserError: shapes that do not fit each other, values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (_array(x) for x in (mu1, sigma1, mu2, sigma2))
    dim = mu1.size
    shapes = [mu1.shape, sigma1.shape, mu2.shape, sigma2.shape]
    if shapes != [(dim,), (dim, dim), (dim,), (dim, dim)]:
        raise UserError(
            f"statistics of different dimensions: mu {mu1.shape} and {mu2.shape}, sigma {sigma1.shape} and {sigma2.shape}",
            "both must come from the same feature extractor",
        )
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError("the statistics hold values that are not finite")
    value = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * _trace_sqrt_product(sigma1, sigma2)
    return max(float(value), 0.0)


def _trace_sqrt_product(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) of two symmetric non-negative matrices. With S = L L^T it is the sum of square roots of the eigenvalues of
    L1^T S2 L1, and equally the sum of the singular values of L1^T L2."""
    factor = _factor(sigma1)
    if factor.shape[1] == 0:
        return 0.0
    values = np.linalg.eigvalsh(factor.T @ sigma2 @ factor)
    if values[0] > len(values) * np.finfo(np.float64).eps * values[-1]:
        return float(np.sqrt(values).sum())
    # Some eigenvalues are zero up to rounding, which a square root would magnify from 1e-16 to 1e-8; singular values have no such trouble.
    return float(np.linalg.svd(factor.T @ _factor(sigma2), compute_uv=False).sum())


def _factor(sigma: np.ndarray) -> np.ndarray:
    """L [d, rank] with sigma = L L^T; directions that are zero up to rounding are left out."""
    values, vectors = np.linalg.eigh(sigma)
    keep = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, keep] * np.sqrt(values[keep])


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


class FeatureStatistics:
    """Mean and covariance of features that come in batches of any size, in memory of two d x d matrices.

    Kept as (n, mean, sum of outer products about the mean) and merged by Chan's formula: no cancellation, and the parts of several workers
    give the statistics of the whole.
    """

    def __init__(self, dim: int):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        return len(self.mean)

    def update(self, features: Tensor) -> None:
        """Add features [k, dim]."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(f"features of shape {tuple(features.shape)} where [n, {self.dim}] is expected")
        if len(features):
            features = features.detach().to("cpu", torch.float64)
            mean = features.mean(0)
            centred = features - mean
            self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Add another part (in place)."""
        if other.dim != self.dim:
            raise UserError(f"cannot merge statistics of {other.dim} features into those of {self.dim}")
        if other.n:
            self._add(other.n, other.mean, other.scatter)
        return self

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.n + n
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    @property
    def cov(self) -> Tensor:
        """Covariance [dim, dim] float64, divided by n - 1. UserError for fewer than 2 samples."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images; there {'is' if self.n == 1 else 'are'} {self.n}")
        return self.scatter / (self.n - 1)
