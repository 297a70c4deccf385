"""Fréchet distance between two Gaussians, and the streaming mean and covariance that it compares. Everything in
float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from d2o.errors import UserError

ArrayLike = np.ndarray | Tensor
TRACE_METHOD = "eigvalsh"
EPS = float(np.finfo(np.float64).eps)


def frechet_distance(
    mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike, factor2: np.ndarray | None = None
) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), the squared 2-Wasserstein distance of N(mu1, S1) and N(mu2,
    S2) (what FID is).

    mu [d], sigma [d, d], numpy arrays or torch tensors of any float type, n - 1 covariances. `factor2`:
    `factor(sigma2)`, which many distances to one reference may share. Symmetric, never negative, exact also where n <=
    d.
    UserError: shapes that do not fit each other, values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (_array(x) for x in (mu1, sigma1, mu2, sigma2))
    dim = mu1.size
    shapes = [mu1.shape, sigma1.shape, mu2.shape, sigma2.shape]
    if shapes != [(dim,), (dim, dim), (dim,), (dim, dim)]:
        raise UserError(
            f"statistics of different dimensions: mu {mu1.shape} and {mu2.shape}, sigma {sigma1.shape} and"
            f" {sigma2.shape}",
            "both must come from the same feature extractor",
        )
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError("the statistics hold values that are not finite")
    trace = _trace_sqrt_product(sigma1, sigma2, factor(sigma2) if factor2 is None else factor2)
    value = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(value), 0.0)


def factor(sigma: ArrayLike) -> np.ndarray:
    """L [d, rank] with sigma = L L^T, of a symmetric non-negative matrix [d, d]: Cholesky's where sigma clearly has
    full rank (many times faster), else from the eigenvectors, without the directions that are zero up to rounding."""
    sigma = _array(sigma)
    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(np.array(sigma, order="C")))
    if not failed:
        # The trace of the inverse bounds the smallest eigenvalue from below: 1 / tr S^-1 <= smallest.
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(sigma), dtype=torch.float64), upper=False)
        if len(sigma) * EPS * np.trace(sigma) * float(inverse.square().sum()) < 1:
            return lower.numpy()
    values, vectors = np.linalg.eigh(sigma)
    keep = values > len(values) * EPS * max(values[-1], 0.0)
    return vectors[:, keep] * np.sqrt(values[keep])


def _trace_sqrt_product(sigma1: np.ndarray, sigma2: np.ndarray, factor2: np.ndarray) -> float:
    """tr (S1 S2)^(1/2) of two symmetric non-negative matrices. With S = L L^T it is the sum of square roots of the
    eigenvalues of L2^T S1 L2 (or L1^T S2 L1), and equally the sum of the singular values of L1^T L2."""
    trace = _sum_of_roots(factor2.T @ sigma1 @ factor2)
    if trace is not None:
        return trace
    # Some eigenvalues are zero up to rounding, which a square root would magnify from 1e-16 to 1e-8. Leave the null
    # space of S1 out, too.
    factor1 = factor(sigma1)
    if factor1.shape[1] < factor2.shape[1]:
        trace = _sum_of_roots(factor1.T @ sigma2 @ factor1)
        if trace is not None:
            return trace
    return float(np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum())  # singular values have no such trouble


def _sum_of_roots(product: np.ndarray) -> float | None:
    """The sum of the square roots of a symmetric matrix's eigenvalues; None if some of them are zero up to rounding."""
    if not len(product):
        return 0.0
    values = np.linalg.eigvalsh(product)
    return float(np.sqrt(values).sum()) if values[0] > len(values) * EPS * values[-1] else None


def _array(x: ArrayLike) -> np.ndarray:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


class Moments:
    """Mean and covariance of features that come in batches of any size, in memory of two d x d matrices.

    Kept as (n, mean, sum of outer products about the mean) and merged by Chan's formula: no cancellation, and the parts
    of several workers give the statistics of the whole.
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
            # The shift of the mean is one row more of the scatter; all is added in one pass over the large matrix.
            shift = (mean - self.mean) * (self.n * len(features) / (self.n + len(features))) ** 0.5
            rows = torch.cat([features - mean, shift[None]])
            self.scatter.addmm_(rows.T, rows)
            self._move_mean(len(features), mean)

    def merge(self, other: Moments) -> Moments:
        """Add another part (in place)."""
        if other.dim != self.dim:
            raise UserError(f"cannot merge statistics of {other.dim} features into those of {self.dim}")
        if other.n:
            shift = other.mean - self.mean
            self.scatter.add_(other.scatter).addr_(shift, shift, alpha=self.n * other.n / (self.n + other.n))
            self._move_mean(other.n, other.mean)
        return self

    def _move_mean(self, n: int, mean: Tensor) -> None:
        self.n += n
        self.mean = self.mean + (mean - self.mean) * (n / self.n)

    @property
    def cov(self) -> Tensor:
        """Covariance [dim, dim] float64, divided by n - 1. UserError for fewer than 2 samples."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images; there {'is' if self.n == 1 else 'are'} {self.n}")
        return self.scatter / (self.n - 1)
