"""The bootstrap: deviations that repeated experiments confirm, and the same numbers for the same seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from d2o.errors import UserError
from d2o.metrics import bootstrap
from d2o.metrics.bootstrap import bootstrap_frechet, bootstrap_mean
from d2o.metrics.frechet import frechet_distance

EYE = np.eye(6)


def features(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) * 1.2 + 0.3


def distance(x: torch.Tensor) -> float:
    return frechet_distance(x.double().mean(0), np.cov(x.double().numpy(), rowvar=False), np.zeros(6), EYE)


def test_frechet_deviation_is_that_of_repeated_experiments() -> None:
    fresh = np.array([distance(features(300, seed)) for seed in range(400)])
    spreads = [bootstrap_frechet(features(300, 1000 + i), np.zeros(6), EYE, 100, i) for i in range(5)]
    assert np.mean([s.std for s in spreads]) == pytest.approx(fresh.std(), rel=0.15)
    for i, s in enumerate(spreads):
        value = distance(features(300, 1000 + i))
        assert s.low < value < s.high
        assert s.high - s.low == pytest.approx(4 * s.std, rel=0.35)


def test_frechet_resample_is_that_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By weights and blocks, far from zero, as by repeating the rows."""
    monkeypatch.setattr(bootstrap, "ROWS", 17)
    x, draw = features(100, 0) + 1e3, np.random.RandomState(9)
    values = [distance(x[torch.from_numpy(draw.randint(100, size=100))] - 1e3) for _ in range(8)]
    assert bootstrap_frechet(x, np.full(6, 1e3), EYE, 8, 9).std == pytest.approx(np.std(values, ddof=1), rel=1e-6)


def test_frechet_of_few_images() -> None:
    """Fewer images than features, also in the reference."""
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    reference = np.cov(np.random.default_rng(0).normal(size=(12, 16)), rowvar=False)
    spread = bootstrap_frechet(x, np.zeros(16), reference, 20, 0)
    assert 0 < spread.std < 10 and spread.low < spread.high


def test_mean_has_the_standard_error() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2 + 7
    spread = bootstrap_mean(values, 1000, 0)
    assert spread.std == pytest.approx(float(values.std()) / math.sqrt(500), rel=0.1)
    assert spread.low == pytest.approx(float(values.mean()) - 1.96 * spread.std, abs=0.3 * spread.std)
    assert spread.high == pytest.approx(float(values.mean()) + 1.96 * spread.std, abs=0.3 * spread.std)
    assert bootstrap_mean(torch.full((5,), 3.0), 10, 0) == (0, 3, 3)


def test_same_seed_same_numbers() -> None:
    np.random.seed(0)
    x, before = features(50, 0), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    assert (
        bootstrap_frechet(x, np.zeros(6), EYE, 5, 3)
        == bootstrap_frechet(x, np.zeros(6), EYE, 5, 3)
        != bootstrap_frechet(x, np.zeros(6), EYE, 5, 4)
    )
    assert bootstrap_mean(x[:, 0], 5, 3) == bootstrap_mean(x[:, 0], 5, 3) != bootstrap_mean(x[:, 0], 5, 4)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_refuses_what_cannot_be_resampled() -> None:
    with pytest.raises(UserError, match="1 image; it needs at least 2"):
        bootstrap_frechet(features(1, 0), np.zeros(6), EYE, 5, 0)
    with pytest.raises(UserError, match="0 images; it needs at least 1"):
        bootstrap_mean(torch.empty(0), 5, 0)
    with pytest.raises(UserError, match="at least 2 resamples, not 1"):
        bootstrap_mean(torch.ones(4), 1, 0)
    with pytest.raises(UserError, match="not finite"):
        bootstrap_mean(torch.tensor([1.0, math.nan]), 5, 0)
    with pytest.raises(UserError, match="different dimensions"):
        bootstrap_frechet(features(20, 0), np.zeros(5), np.eye(5), 5, 0)
