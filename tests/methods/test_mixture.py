"""SiD and DMD where the right answer is known: the denoiser of a mixture of Gaussians, taught to an MLP by the real
methods and training loop."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch

from benchmarks.mixture import PLANE, SPEC, PlaneDenoiser, distil, energy_distance, fresh, make_teacher
from d2o.students.base import Student


@functools.cache
def teacher(width: int):
    torch.set_num_threads(1)
    return make_teacher(width, iterations=600, batch=256)


def test_the_energy_distance_tells_distributions_apart():
    x, y = (PLANE.sample(2000, seed, (2,))[0].float() for seed in (1, 2))
    assert abs(energy_distance(x, y)) < 0.005 < 0.03 < energy_distance(x, y + 0.3)
    assert energy_distance(torch.tensor([[0.0, 0], [0, 2]]), torch.tensor([[0.0, 1], [0, 1]])) == pytest.approx(
        2 * 1 - 2 - 0
    )
    assert max(fresh(PLANE, 5)) < 0.005


@pytest.mark.long
def test_the_teacher_is_exact_and_what_is_trained_of_it_is_not():
    exact = teacher(12)
    x = torch.randn(5, 2, 1, 1)
    assert torch.allclose(exact.denoise(x, 0.7), PLANE.posterior(x, 1.0, 0.7)[0].float(), atol=1e-6)
    mlp = copy.deepcopy(exact.network)
    assert isinstance(mlp, PlaneDenoiser) and mlp.exact is None and Student(mlp, SPEC)(x).shape == (5, 2, 1, 1)


@pytest.mark.long
@pytest.mark.parametrize("name", ["sid alpha 1", "sid alpha 1.2", "dmd"])
def test_the_student_comes_to_the_mixture(name, tmp_path: Path):
    found = distil(name, teacher(64), 128 * 400, tmp_path, every=128 * 400)
    start, end = found["curve"][0][1], found["energy"]
    assert start > 0.3 and end < 0.03, found
    assert all(
        share == pytest.approx(weight, abs=0.1) for share, weight in zip(found["shares"], [0.5, 0.3, 0.2], strict=True)
    ), found["shares"]


@pytest.mark.long
def test_alpha_0_is_worse_where_the_score_network_is_not_exact(tmp_path: Path):
    """The ablation of SiD, and of SiDA, section 5.1: by the same number of images the student has learnt less."""
    ends = {
        alpha: distil(f"sid alpha {alpha}", teacher(12), 128 * 200, tmp_path / alpha, every=128 * 200)["energy"]
        for alpha in ("0", "1", "1.2")
    }
    assert ends["0"] > 1.5 * max(ends["1"], ends["1.2"]), ends
