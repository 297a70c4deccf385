"""The Fréchet distance against scipy's matrix square root, exact values, and known identities."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from d2o.errors import UserError
from d2o.metrics.frechet import Moments, factor, frechet_distance


def gaussian(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * 0.3 + rng.normal(size=d)


def stats(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize("d", [2, 16, 64])
def test_equals_sqrtm_at_full_rank(d: int) -> None:
    rng = np.random.default_rng(d)
    (m1, s1), (m2, s2) = stats(gaussian(rng, 5 * d, d)), stats(gaussian(rng, 7 * d, d))
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * np.real(root))
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 300), (300, 20), (2, 5)])
def test_exact_where_rank_deficient(n: int, m: int) -> None:
    """tr (S1 S2)^(1/2) is the nuclear norm of Xc Yc^T / sqrt((n - 1)(m - 1))."""
    rng = np.random.default_rng(n + m)
    x, y = gaussian(rng, n, 96), gaussian(rng, m, 96)
    (m1, s1), (m2, s2) = stats(x), stats(y)
    nuclear = np.linalg.norm((x - m1) @ (y - m2).T / np.sqrt((n - 1) * (m - 1)), "nuc")
    expected = np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * nuclear
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)


def test_exact_at_the_size_of_a_real_extractor() -> None:
    """512 features of 100 and 120 images: where scipy's square root and the eigenvalues of S1 S2 are off."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 512)), rng.normal(size=(120, 512)) * 1.1 + 0.1
    (m1, s1), (m2, s2) = stats(x), stats(y)
    nuclear = np.linalg.svd((x - m1) @ (y - m2).T / np.sqrt(99 * 119), compute_uv=False).sum()
    expected = np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * nuclear
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [40, 1000])
@pytest.mark.parametrize("m", [50, 900])
def test_the_factor_of_the_reference_may_be_kept(n: int, m: int) -> None:
    rng = np.random.default_rng(n + m)
    (m1, s1), (m2, s2) = stats(gaussian(rng, n, 96)), stats(gaussian(rng, m, 96))
    kept = factor(s2)
    assert kept.shape == (96, min(m - 1, 96))
    np.testing.assert_allclose(kept @ kept.T, s2, atol=1e-10 * np.abs(s2).max())
    assert frechet_distance(m1, s1, m2, s2, kept) == frechet_distance(m1, s1, m2, s2)


@pytest.mark.parametrize("smallest", [1e-8, 1e-11, 1e-13, 1e-16])
def test_exact_for_widely_spread_variances(smallest: float) -> None:
    """Diagonal covariances in a rotated basis, whose distance is known; the smallest variances reach down to the
    rounding of the largest."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    a, b = np.geomspace(1, smallest, 60), np.geomspace(2, smallest, 60)
    s1, s2 = ((basis * values) @ basis.T for values in (a, b))
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(np.zeros(60), (s1 + s1.T) / 2, np.zeros(60), (s2 + s2.T) / 2) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("n", [10, 500])
def test_zero_to_itself_and_symmetric(n: int) -> None:
    rng = np.random.default_rng(n)
    (m1, s1), (m2, s2) = stats(gaussian(rng, n, 64)), stats(gaussian(rng, n, 64))
    assert 0 <= frechet_distance(m1, s1, m1, s1) < 1e-6
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(frechet_distance(m2, s2, m1, s1), rel=1e-9)


def test_mean_shift_and_scale_are_analytic() -> None:
    s, eye = stats(gaussian(np.random.default_rng(0), 200, 8))[1], np.eye(8)
    assert frechet_distance(np.zeros(8), s, np.full(8, 3.0), s) == pytest.approx(72, rel=1e-9)
    assert frechet_distance(np.zeros(8), 4 * eye, np.zeros(8), 9 * eye) == pytest.approx(8, rel=1e-12)
    assert frechet_distance(np.zeros(8), 0 * eye, np.zeros(8), eye) == pytest.approx(8, rel=1e-12)


def test_takes_tensors_of_any_float_type() -> None:
    eye = torch.eye(3, dtype=torch.float16)
    assert frechet_distance(torch.zeros(3), eye, torch.ones(3, dtype=torch.float64), eye.numpy()) == pytest.approx(3)


def test_refuses_other_dimensions_and_nan() -> None:
    with pytest.raises(UserError, match="different dimensions"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(np.full(3, np.nan), np.eye(3), np.zeros(3), np.eye(3))


def test_streaming_equals_np_cov_far_from_zero() -> None:
    x = (
        torch.as_tensor(gaussian(np.random.default_rng(1), 1000, 12)).float() + 1e4
    )  # a naive sum of squares loses 8 digits here
    stream = Moments(12)
    for part in x.split([1, 499, 0, 300, 200]):
        stream.update(part)
    assert stream.n == 1000
    np.testing.assert_allclose(stream.mean, x.double().numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(stream.cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_merged_parts_equal_the_whole() -> None:
    x = torch.as_tensor(gaussian(np.random.default_rng(2), 300, 6))
    whole, left, right, empty = (Moments(6) for _ in range(4))
    whole.update(x)
    left.update(x[:17])
    right.update(x[17:])
    left.merge(right).merge(empty)
    assert left.n == 300
    torch.testing.assert_close(left.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(left.cov, whole.cov, rtol=1e-12, atol=1e-13)


def test_statistics_refuse_what_does_not_fit() -> None:
    stream = Moments(4)
    stream.update(torch.zeros(1, 4))
    with pytest.raises(UserError, match="at least 2 images"):
        _ = stream.cov
    with pytest.raises(UserError, match=r"\[n, 4\]"):
        stream.update(torch.zeros(3, 5))
    with pytest.raises(UserError, match="5 features into those of 4"):
        stream.merge(Moments(5))
