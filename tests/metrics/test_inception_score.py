"""The inception score against torch-fidelity, guided-diffusion's splits written out, and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from d2o.errors import UserError
from d2o.interop import torchvision_compat
from d2o.metrics import inception_score as module
from d2o.metrics.inception_score import inception_score

torchvision_compat.ensure()
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402


def logits(n: int, classes: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)) * 3


def by_hand(x: np.ndarray) -> float:
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


@pytest.mark.parametrize(("n", "splits", "seed"), [(1000, 10, 2020), (1003, 7, 2020), (50, 1, 3), (10, 10, 0)])
def test_equals_torch_fidelity(n: int, splits: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 37)  # several blocks a split
    ours, theirs = inception_score(logits(n), splits, seed=seed), isc_features_to_metric(logits(n), splits, True, seed)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)
    assert ours.splits == splits


def test_edm_order_splits_in_the_order_of_generation() -> None:
    x = logits(200)
    parts = [by_hand(part.double().numpy()) for part in x.split(50)]
    ours = inception_score(x, 4, "edm_order")
    assert ours.mean == pytest.approx(np.mean(parts), rel=1e-12) and ours.std == pytest.approx(np.std(parts), rel=1e-9)
    theirs = isc_features_to_metric(x, 4, False)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)


def test_adm_takes_parts_of_5000_and_reports_no_deviation() -> None:
    x = logits(11_000, 5)
    parts = [by_hand(part.double().numpy()) for part in x.split(5000)]
    assert len(parts) == 3
    ours = inception_score(x, mode="adm")
    assert ours == (pytest.approx(np.mean(parts), rel=1e-12), None, 3)


def test_known_values() -> None:
    sure = torch.eye(10).repeat(20, 1) * 2000  # every class as often, without doubt (p is 0 elsewhere, also in float64)
    assert inception_score(sure, 1).mean == pytest.approx(10, rel=1e-12)
    assert inception_score(torch.zeros(50, 10), 5) == (pytest.approx(1), pytest.approx(0, abs=1e-12), 5)
    assert inception_score(torch.eye(10)[:1].repeat(20, 1) * 2000, 2).mean == pytest.approx(1)  # one class only


def test_images_ordered_by_class_mislead_only_without_shuffling() -> None:
    ordered = torch.eye(10).repeat_interleave(100, 0) * 50
    assert inception_score(ordered, 10, "edm_order").mean == pytest.approx(1, abs=1e-6)
    assert inception_score(ordered, 10).mean > 9


def test_refuses_what_has_no_score() -> None:
    with pytest.raises(UserError, match="9 images in 10 splits"):
        inception_score(logits(9), 10)
    with pytest.raises(UserError, match="not finite"):
        inception_score(torch.full((20, 3), math.nan))
    with pytest.raises(UserError, match="not finite"):
        inception_score(torch.tensor([[math.inf, 0.0]]).repeat(20, 1))
    with pytest.raises(UserError, match="did you mean 'edm_order'"):
        inception_score(logits(20), mode="edm_ordre")
    with pytest.raises(UserError, match=r"expected"):
        inception_score(torch.zeros(20))
    with pytest.raises(UserError, match="at least 1, not 0"):
        inception_score(logits(20), 0)
