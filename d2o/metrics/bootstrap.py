"""How much a result would change with other images: the bootstrap over images (Efron 1979)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.metrics.frechet import ArrayLike, factor, frechet_distance

ROWS = 4096  # features that are in float64 at one time


class Spread(NamedTuple):
    """Standard deviation over the resamples, and the interval that holds 95 % of them."""

    std: float
    low: float
    high: float


def bootstrap_frechet(features: Tensor, mu: ArrayLike, sigma: ArrayLike, samples: int, seed: int) -> Spread:
    """Of the Fréchet distance of features [n, d] to a reference (mu [d], sigma [d, d]), which is held fixed.

    A resample holds each image as often as n draws with replacement (numpy's RandomState(seed)) hit it. As it knows
    fewer different images, its distance is larger, by about the bias that the distance of n images has anyhow; so the
    interval is that of the resamples about their mean, moved to the distance itself. One resample costs about as much
    as gathering the statistics and one distance; the reference is
    decomposed once. UserError: fewer than 2 images or resamples, and as `frechet_distance`.
    """
    _check(features, 2, samples)
    rows = features.detach().cpu()
    n = len(rows)
    root = factor(sigma)
    # About the mean, so that little cancels where features are far from 0.
    centre = torch.stack([part.double().sum(0) for part in rows.split(ROWS)]).sum(0).numpy() / n
    value = frechet_distance(*_moments(rows, np.ones(n), centre), mu, sigma, root)
    draw = np.random.RandomState(seed)
    values = np.empty(samples)
    for i in range(samples):
        times = np.bincount(draw.randint(n, size=n), minlength=n)
        values[i] = frechet_distance(*_moments(rows, times, centre), mu, sigma, root)
    low, high = np.percentile(values - values.mean(), [2.5, 97.5]) + value
    return Spread(float(values.std(ddof=1)), max(float(low), 0.0), float(high))


def bootstrap_mean(values: Tensor, samples: int, seed: int) -> Spread:
    """Of the mean of values [n], by n draws with replacement (numpy's RandomState(seed)). UserError: no values, fewer
    than 2 resamples, values that are not finite."""
    _check(values[:, None] if values.ndim == 1 else values, 1, samples)
    all_, draw = values.detach().cpu().double().numpy(), np.random.RandomState(seed)
    means = np.array([all_[draw.randint(len(all_), size=len(all_))].mean() for _ in range(samples)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Spread(float(means.std(ddof=1)), float(low), float(high))


def _moments(rows: Tensor, times: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance (n - 1) in float64 of rows [n, d], each counted `times` [n] over, n times in all."""
    n, dim = rows.shape
    total, scatter = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, n, ROWS):
        weight = times[start : start + ROWS]
        held = np.flatnonzero(weight)
        weighted = rows[start + torch.from_numpy(held)].double().numpy() - centre
        total += weight[held] @ weighted
        weighted *= np.sqrt(weight[held])[:, None]
        scatter += weighted.T @ weighted  # numpy sees that it is symmetric and computes half of it
    shift = total / n
    return centre + shift, (scatter - n * np.outer(shift, shift)) / (n - 1)


def _check(features: Tensor, least: int, samples: int) -> None:
    if features.ndim != 2:
        raise UserError(f"values of shape {tuple(features.shape)} where one row an image is expected")
    if len(features) < least:
        raise UserError(
            f"a bootstrap over {len(features)} image{'s' * (len(features) != 1)}; it needs at least {least}"
        )
    if samples < 2:
        raise UserError(f"a standard deviation needs at least 2 resamples, not {samples}", "--bootstrap 100 is common")
    if not bool(torch.isfinite(features).all()):
        raise UserError(
            "the features hold values that are not finite", "the extractor's weights or the images are damaged"
        )
