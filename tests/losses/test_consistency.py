"""Karras' grid, jumps, solver steps, schedules and distances against formulas written out again, and against a Gaussian
whose ODE is known."""

from __future__ import annotations

import math

import pytest
import torch

from d2o.diffusion.schedules import EDMSchedule, karras_sigmas
from d2o.diffusion.solvers import heun
from d2o.losses import consistency as c
from d2o.losses.regression import pseudo_huber
from tests.diffusion.mixture import gaussian_solution

MEAN, STD = 0.3, 0.5


def denoise(x, t):
    """E[x_0 | x_t] of N(0.3, 0.25)."""
    share = (STD**2 / (STD**2 + t**2)).to(x.dtype)[:, None, None, None]
    return MEAN + share * (x - MEAN)


def solution(x, t, s):
    """The ODE of that Gaussian from t to s (numbers)."""
    return gaussian_solution(x, MEAN, STD, (1.0, t), (1.0, s))


def at(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_grid_is_equation_5_and_karras():
    assert c.karras_time(at(225, 243), 256).tolist() == pytest.approx(
        [39.95, 60.29], abs=0.005
    )  # the paper says 40 and 60
    assert c.karras_time(torch.arange(5), 4).tolist() == pytest.approx([0.002, 0.170, 2.515, 17.53, 80], rel=2e-3)
    ascending = karras_sigmas(18)[:-1].flip(0)
    assert torch.allclose(c.karras_time(torch.arange(18), 17), ascending, rtol=1e-12)
    assert torch.equal(
        c.karras_time(torch.tensor(0), 17).float(), torch.tensor(0.002)
    )  # to the bit: there the network is the identity


def test_jumps_and_what_undoes_them():
    x, f = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t, s = at(80.0, 2.0, 0.1), at(2.0, 2.0, 0.002)
    by_hand = ((t - s) / t)[:, None, None, None] * (f - x) + x
    assert torch.allclose(c.jump(x, f, t, s), by_hand, rtol=1e-12)
    assert torch.equal(c.jump(x, f, t, t), x)
    s = at(1.0, 0.5, 0.05)
    assert torch.allclose(c.progressive_target(x, c.jump(x, f, t, s), t, s), f, rtol=1e-10)
    # the x_0 target of OpenAI's code: x - t (x'' - x) / (t'' - t)
    h = c.jump(x, f, t, s)
    openai = x - t[:, None, None, None] * (h - x) / (s - t)[:, None, None, None]
    assert torch.allclose(c.progressive_target(x, h, t, s), openai, rtol=1e-10)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solver_steps_have_their_order(solver, order):
    x = torch.randn(200, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for n in (16, 32, 64):
        y = x
        for i in reversed(range(n)):
            t, u = (torch.full((len(x),), 0.3 * 3 ** (k / n), dtype=torch.float64) for k in (i + 1, i))
            y = c.SOLVERS[solver](denoise, y, t, u)
        errors.append((y - solution(x, 0.9, 0.3)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25) == math.log2(errors[1] / errors[2])


def test_a_heun_step_is_the_sampler_s():
    x = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    grid = EDMSchedule().grid(18)
    whole = heun(lambda y, t: denoise(y, t).float(), x * 80, grid)
    y = x * 80
    for t, u in zip(grid.t[:-2].tolist(), grid.t[1:-1].tolist()):
        y = c.heun_step(denoise, y, torch.full((5,), t), torch.full((5,), u))
    last = c.euler_step(denoise, y, torch.full((5,), 0.002), torch.full((5,), 0.0))
    assert torch.allclose(last, whole, atol=1e-5)


def test_distances_by_hand():
    x, y = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    d = (x - y).flatten(1)
    assert torch.allclose(c.distance("l2", x, y), d.square().mean(1))
    assert torch.allclose(c.distance("l1", x, y), d.abs().mean(1))
    for reduce in ("vector", "element"):
        assert torch.equal(c.distance("pseudo_huber", x, y, reduce), pseudo_huber(x, y, reduce))
    seen = []

    def network(a, b):
        seen.append((a.shape, a.min() >= x.min(), b.max() <= y.max()))
        return (a - b).square().mean(dim=(1, 2, 3))

    assert c.distance("lpips", x[:, :1], y[:, :1], network=network).shape == (4,)
    assert seen == [((4, 3, 224, 224), True, True)]  # grey is repeated; bilinear keeps the range


def test_weights():
    t, u = at(0.5, 4.0), at(0.25, 2.0)
    assert c.weight("uniform", t, u).tolist() == [1, 1]
    assert c.weight("inverse_gap", t, u).tolist() == [4, 0.5]
    assert c.weight("truncated_snr", t, u).tolist() == [4, 1]


def test_the_schedules_of_n():
    # iCT: s0 10, s1 1280, K' = floor(K / 8)
    assert [c.doubling(k, 800, 10, 1280) for k in (0, 99, 100, 250, 799, 5000)] == [11, 11, 21, 41, 1281, 1281]
    # CT: s0 at the start, s1 + 1 at the end, and in between
    assert (c.adaptive(0, 1000, 2, 150), c.adaptive(1000, 1000, 2, 150), c.adaptive(9999, 1000, 2, 150)) == (
        2,
        151,
        151,
    )
    assert c.adaptive(250, 1000, 2, 150) == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    assert c.adaptive_mu(2, 2, 0.9) == pytest.approx(0.81) and c.adaptive_mu(151, 2, 0.9) == pytest.approx(
        math.exp(2 * math.log(0.9) / 150)
    )


def test_the_stages_of_progressive_distillation():
    # CIFAR-10: from 4096, 50,000 iterations a stage, the last two twice as long: 750,000 in all
    assert c.stage(0, 4096, 1, 50_000) == (4096, 0, 50_000)
    assert c.stage(549_999, 4096, 1, 50_000) == (4, 500_000, 50_000) and c.stage(550_000, 4096, 1, 50_000) == (
        2,
        550_000,
        100_000,
    )
    assert c.stage(650_000, 4096, 1, 50_000) == (1, 650_000, 100_000) == c.stage(2_000_000, 4096, 1, 50_000)
    assert c.stage(100, 8, 2, 10) == (2, 20, 20)


def test_lognormal_indices_have_their_shares():
    n, uniform = 17, (torch.arange(20_000) + 0.5) / 20_000
    i = c.lognormal_index(uniform, n, -1.1, 2.0)
    edges = c.karras_time(torch.arange(n + 1), n).log()
    mass = (torch.erf((edges + 1.1) / (2.0 * math.sqrt(2)))).diff()
    assert (
        torch.allclose(torch.bincount(i, minlength=n + 1)[1:] / 20_000, (mass / mass.sum()).float(), atol=1e-3)
        and i.min() >= 1
        and i.max() <= n
    )
