"""Precision, recall, density, coverage and nearest features against prdc, torch-fidelity and plain float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from prdc import compute_prdc
from torch import Tensor

from d2o.errors import UserError
from d2o.interop import torchvision_compat
from d2o.metrics import distances
from d2o.metrics.prdc import density_coverage, manifold, nearest_rows, precision_recall

torchvision_compat.ensure()
from torch_fidelity.metric_prc import calculate_precision_recall_full, prc_features_to_metric  # noqa: E402


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small sets have several blocks, the last one smaller."""
    monkeypatch.setattr(distances, "BLOCK", 70)


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale + shift


def four(real: Tensor, fake: Tensor, k: int, **more: Any) -> dict[str, float]:
    found = manifold(real, fake, k, k, inclusive_pr=False, **more)
    return {"precision": found.precision, "recall": found.recall, "density": found.density, "coverage": found.coverage}


def in_float64(real: Tensor, fake: Tensor, k: int, inclusive: bool = False) -> dict[str, float]:
    """From the differences themselves: what the definitions say, without any trick."""
    real, fake = real.double(), fake.double()

    def squares(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(row - b).square().sum(1) for row in a])

    between = squares(real, fake)
    about_real, about_fake = (squares(x, x).kthvalue(k + 1).values for x in (real, fake))
    in_real, in_fake = (
        between <= radius if inclusive else between < radius for radius in (about_real[:, None], about_fake)
    )
    return {
        "precision": float(in_real.any(0).double().mean()),
        "recall": float(in_fake.any(1).double().mean()),
        "density": float(in_real.sum()) / (k * len(fake)),
        "coverage": float(in_real.any(1).double().mean()),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 64), (90, 250, 7), (250, 90, 300), (140, 140, 1)])
def test_equals_prdc(n: int, m: int, d: int, k: int) -> None:
    real, fake = normal(n, d, 0), normal(m, d, 1, 0.95, 0.05)
    assert four(real, fake, k) == pytest.approx(
        compute_prdc(real.double().numpy(), fake.double().numpy(), k), abs=1e-12
    )


def test_gaussian_of_prdc_readme() -> None:
    """N(0, I) of 1000 dimensions, k = 5, at 500 instead of 10,000 images."""
    real, fake = normal(500, 1000, 0), normal(500, 1000, 1)
    expected = compute_prdc(real.numpy(), fake.numpy(), 5)
    assert four(real, fake, 5) == pytest.approx(expected, abs=1e-12)
    assert 0.5 < expected["precision"] < 0.7 and expected["coverage"] > 0.9


@pytest.mark.parametrize("k", [1, 3])
def test_equals_torch_fidelity(k: int) -> None:
    real, fake = normal(300, 50, 0), normal(200, 50, 1, 0.95)
    assert precision_recall(real, fake, k) == pytest.approx(
        calculate_precision_recall_full(fake.double(), real.double(), k), abs=1e-6
    )
    theirs = prc_features_to_metric(
        fake, real, prc_neighborhood=k, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    assert precision_recall(real, fake, k) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1 / 200)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("shift", [0.0, 3e3])
def test_ties_and_near_ties_come_out_as_in_exact_arithmetic(shift: float, inclusive: bool) -> None:
    """Features on a grid have many equal distances, far from zero squares cancel in float32; a third of the fakes
    repeat reals."""
    grid = torch.randint(-2, 3, (330, 6), generator=torch.Generator().manual_seed(5)).float() + shift
    real, fake = grid[:200], torch.cat([grid[200:], grid[:60]])
    found = manifold(real, fake, 3, 3, inclusive_pr=inclusive, inclusive_dc=inclusive)
    expected = in_float64(real, fake, 3, inclusive)
    assert found.__dict__ == pytest.approx(expected, abs=1e-12)
    assert expected != in_float64(real, fake, 3, not inclusive)  # the ties do decide


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_a_tight_cloud_away_from_the_rest_is_resolved(scale: float) -> None:
    """The cloud's own distances are below (or about) the rounding of float32 products."""
    cloud = normal(1, 40, 1) * 30 + normal(160, 40, 2, scale)
    real, fake = torch.cat([normal(150, 40, 0), cloud[:80]]), cloud[80:]
    assert (torch.cdist(cloud, cloud) - torch.cdist(cloud.double(), cloud.double())).abs().max() > 0.02
    distance, index = nearest_rows(fake, real, 2)
    expected = (
        torch.stack([(row - real.double()).square().sum(1) for row in fake.double()]).sqrt().topk(2, largest=False)
    )
    torch.testing.assert_close(distance, expected.values, rtol=1e-9, atol=0)
    assert (index == expected.indices).all()
    found = four(real, fake, 3)
    assert found == pytest.approx(in_float64(real, fake, 3), abs=1e-12)
    assert 0.1 < found["recall"] < 0.5 and found["precision"] > 0.5


def test_collapsed_and_identical_sets() -> None:
    real = normal(100, 10, 0)
    assert four(real, real, 5)["coverage"] == 1
    one = real[:1].expand(300, -1)  # a generator that makes one real image over and over
    found = manifold(real, one)
    assert found.precision == 1 and found.recall == 0.01 and found.coverage < 0.3
    away = manifold(real, one + 100)
    assert (away.precision, away.recall, away.density, away.coverage) == (0, 0, 0, 0)
    same = manifold(one, one)
    assert (same.precision, same.recall) == (1, 1) and (same.density, same.coverage) == (0, 0)  # <= and <, of radius 0


def test_each_pair_alone_is_the_same() -> None:
    real, fake = normal(150, 12, 0), normal(120, 12, 1)
    found = manifold(real, fake, 3, 5)
    assert precision_recall(real, fake) == (found.precision, found.recall)
    assert density_coverage(real, fake) == (found.density, found.coverage)
    assert math.isnan(manifold(real, fake, None, 5).precision) and math.isnan(manifold(real, fake, 3, None).coverage)
    assert precision_recall(fake, real) == (found.recall, found.precision)


def test_features_are_rounded_to_the_dtype_first() -> None:
    real, fake = normal(200, 30, 0, shift=500), normal(200, 30, 1, shift=500)  # float16 is coarse here
    half = manifold(real, fake, dtype="float16")
    assert half == manifold(real.half().float(), fake.half().float()) != manifold(real, fake)
    double = real.double() * (1 + 1e-12)
    assert manifold(double, fake.double(), dtype="float64") == manifold(real, fake)
    with pytest.raises(UserError, match="not finite in float16") as error:
        manifold(real * 1e4, fake, dtype="float16")
    assert "float32" in error.value.hint


def test_nearest_among_others() -> None:
    queries, base = normal(90, 20, 0), normal(200, 20, 1)
    distance, index = nearest_rows(queries, base, 4)
    expected = torch.cdist(queries.double(), base.double()).topk(4, largest=False)
    torch.testing.assert_close(distance, expected.values)
    assert (index == expected.indices).all()
    distance, index = nearest_rows(base[50:53], base)
    assert distance.flatten().tolist() == [0, 0, 0] and index.flatten().tolist() == [50, 51, 52]
    assert nearest_rows(queries, base[:2], 2)[1].sort(1).values.tolist() == [[0, 1]] * 90


def test_refuses_what_cannot_be_compared() -> None:
    real, fake = normal(50, 8, 0), normal(50, 8, 1)
    with pytest.raises(UserError, match="density and coverage with k = 5 need more than 5 images"):
        manifold(real[:5], fake)
    with pytest.raises(UserError, match="precision and recall with k = 3 need more than 3 images.*holds 3"):
        manifold(real, fake[:3])
    assert manifold(real[:6], fake[:4]).recall >= 0
    with pytest.raises(UserError, match="at least 1"):
        precision_recall(real, fake, 0)
    with pytest.raises(UserError, match="8 features.* 7"):
        manifold(real, fake[:, :7])
    broken = fake.clone()
    broken[3, 2] = math.nan
    with pytest.raises(UserError, match="the generated images hold values that are not finite"):
        manifold(real, broken)
    with pytest.raises(UserError, match="features of the queries hold"):
        nearest_rows(broken, real)
    with pytest.raises(UserError, match="51 nearest of 50"):
        nearest_rows(real, fake, 51)
    with pytest.raises(UserError, match="did you mean 'float32'"):
        manifold(real, fake, dtype="float3")
    with pytest.raises(UserError, match=r"expected \[n, d\]"):
        manifold(real, torch.empty(0, 8))
