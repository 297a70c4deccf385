"""KID against torch-fidelity, clean-fid, and the U-statistic written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from d2o.errors import UserError
from d2o.interop import torchvision_compat
from d2o.metrics.kid import kid

torchvision_compat.ensure()
from cleanfid.fid import kernel_distance  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402


def features(n: int, seed: int, shift: float = 0.0, d: int = 96) -> torch.Tensor:
    """Not negative, as pooled activations are."""
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 0.4 + 0.2 + shift).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_equals_torch_fidelity(shift: float, dtype: torch.dtype) -> None:
    x, y = features(400, 0, shift).to(dtype), features(300, 1).to(dtype)
    ours = kid(x, y, 20, 150, seed=7)
    theirs = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=150, rng_seed=7, verbose=False)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=tolerance)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], abs=tolerance)
    assert (ours.subsets, ours.size) == (20, 150)


@pytest.mark.parametrize("size", [150, 1000])
def test_equals_clean_fid_of_the_same_seed(size: int) -> None:
    x, y = features(400, 0, 0.05), features(300, 1)
    state = np.random.get_state()
    try:
        np.random.seed(11)
        theirs = kernel_distance(x.double().numpy(), y.double().numpy(), 20, size)
    finally:
        np.random.set_state(state)
    assert kid(x, y, 20, size, seed=11, order="clean_fid", cap=True).mean == pytest.approx(theirs, abs=1e-6)


def test_one_subset_of_everything_is_the_u_statistic() -> None:
    x, y = features(12, 0, d=5).double(), features(12, 1, d=5).double()

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 5 + 1) ** 3)

    within = [np.mean([k(a, b) for a, b in itertools.permutations(z, 2)]) for z in (x, y)]
    across = np.mean([k(a, b) for a in x for b in y])
    assert kid(x, y, 1, 12).mean == pytest.approx(sum(within) - 2 * across, rel=1e-10)


def test_equal_distributions_give_about_zero_and_a_shift_shows() -> None:
    same, other = (
        kid(features(1000, 0), features(1000, 1), 10, 200),
        kid(features(1000, 0), features(1000, 1, 0.1), 10, 200),
    )
    assert abs(same.mean) < 3 * same.std / np.sqrt(10) + 1e-3
    assert other.mean > 10 * abs(same.mean)


def test_depends_on_its_own_seed_only() -> None:
    x, y = features(300, 0), features(300, 1)
    np.random.seed(1)
    first = kid(x, y, 5, 100)
    np.random.seed(2)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    assert kid(x, y, 5, 100) == first != kid(x, y, 5, 100, seed=1)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_refuses_what_has_no_distance() -> None:
    with pytest.raises(UserError, match="subset size 1000 > 300 images.*400 and 300") as error:
        kid(features(400, 0), features(300, 1))
    assert "--kid-size 300" in error.value.hint
    assert kid(features(400, 0), features(300, 1), 1, cap=True).size == 300
    with pytest.raises(UserError, match="different dimensions"):
        kid(features(20, 0), features(20, 1, d=4), 1, 10)
    with pytest.raises(UserError, match="not finite"):
        kid(features(20, 0), torch.full((20, 96), torch.nan), 1, 10)
    with pytest.raises(UserError, match="at least 2 images"):
        kid(features(20, 0), features(20, 1), 1, 1)
    with pytest.raises(UserError, match="unknown order of draws"):
        kid(features(20, 0), features(20, 1), 1, 10, order="cleanfid")
