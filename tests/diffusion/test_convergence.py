"""The solvers against exact solutions, on data whose denoiser is known."""

import itertools
import math

import pytest
import torch

from d2o.diffusion.schedules import DiscreteSchedule, EDMSchedule, FlowSchedule
from d2o.diffusion.solvers import Solver
from tests.diffusion.mixture import GAUSSIAN, LINE, PLANE, energy_p_value, gaussian_solution

# Equal steps along alpha = cos p, sigma = sin p, on so many time steps that those of the tests are multiples of them.
CIRCLE = DiscreteSchedule(torch.cos(torch.linspace(0.02, 1.55, 4097, dtype=torch.float64)) ** 2, spacing="linspace")
SCHEDULES = {"edm": EDMSchedule(), "vp": CIRCLE, "flow": FlowSchedule()}


def normal(n, dimensions, seed=0):
    return torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ends(schedule):
    grid = schedule.grid(2)
    return (float(grid.alpha[0]), float(grid.sigma[0])), (float(grid.alpha[-1]), float(grid.sigma[-1]))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_reference_is_the_closed_form_for_a_gaussian(schedule):
    start, end = ends(schedule)
    x = normal(50, 1) * start[1]
    assert torch.allclose(
        GAUSSIAN.solution(x, start, end), gaussian_solution(x, 0.3, 0.5, start, end), rtol=0, atol=1e-10
    )


def test_the_reference_keeps_every_quantile_in_one_dimension():
    """On a line the flow cannot change the order of points: it takes each quantile of one marginal to the same of the
    other."""

    def cdf(x, alpha, sigma):
        deviation = (alpha**2 * LINE.log_stds.exp() ** 2 + sigma**2).sqrt()
        return (0.5 * torch.erfc(-(x - alpha * LINE.means.T) / deviation / math.sqrt(2))) @ LINE.logits.softmax(0)

    for start, end in (((1.0, 30.0), (1.0, 0.0)), ((0.2, 0.8), (0.9, 0.1))):
        x = normal(50, 1) * start[1]
        there = LINE.solution(x, start, end)
        assert torch.allclose(cdf(there, *end), cdf(x, *start), rtol=0, atol=1e-9)


def test_the_posterior_is_tweedies():
    """x = alpha D + sigma eps, and eps = -sigma grad log p(x) (Tweedie)."""
    x = normal(30, 2).requires_grad_()
    for alpha, sigma in ((1.0, 0.3), (0.6, 0.8), (0.05, 1.0)):
        x_0, eps = PLANE.posterior(x, alpha, sigma)
        (score,) = torch.autograd.grad(PLANE.log_density(x, alpha, sigma).sum(), x)
        assert torch.allclose(alpha * x_0 + sigma * eps, x, atol=1e-12) and torch.allclose(
            eps, -sigma * score, atol=1e-12
        )
    known = PLANE.posterior(x, 1.0, 0.3, torch.tensor([0, 1, -1] * 10))[0]
    blind = PLANE.posterior(x, 1.0, 0.3)[0]
    assert torch.equal(known[2::3], blind[2::3]) and not torch.allclose(known[0::3], blind[0::3], atol=0.1)


def orders(solver, schedule, mixture):
    """Observed orders of convergence as the steps are doubled, and the last error."""
    z = normal(40, mixture.means.shape[1], seed=1)
    start, end = ends(schedule)
    reference = mixture.solution(z * schedule.grid(2).start, start, end)
    errors = []
    for steps in (65, 129, 257):
        x = Solver(solver, steps).run(mixture.denoiser(schedule), z, schedule)
        assert x.dtype == torch.float64
        errors.append((x - reference).square().mean().sqrt().item())
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)], errors[-1]


@pytest.mark.long
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("solver", "order", "most"), [("euler", 1, 1.5e-2), ("heun", 2, 4e-4), ("dpmpp", 2, 2e-3)])
def test_solvers_converge_with_their_order(solver, order, most, schedule):
    """ddim without fresh noise is euler: see test_solvers."""
    for mixture in (LINE, PLANE):
        observed, error = orders(solver, schedule, mixture)
        assert observed == pytest.approx([order, order], abs=0.25), mixture
        assert error < most


PROBABLE = 0.05


def sampled(solver, schedule, n=2000, seed=3):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 2, generator=generator)
    return solver.run(
        PLANE.denoiser(schedule), z, schedule, lambda: torch.randn(n, 2, generator=generator, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("solver", "schedule"),
    [
        (Solver("heun", 32), "edm"),
        (Solver("dpmpp", 48), "edm"),
        (Solver("euler", 512), "flow"),
        (Solver("heun", 32), "vp"),
        (Solver("sde", 64), "edm"),
        (Solver("sde", 48, s_churn=80, s_noise=1.0), "edm"),
        (Solver("ddim", 128, final="x0", eta=1.0), "sd"),
        (Solver("ddim", 128, final="x0", eta=0.5), "sd"),
        (Solver("ddim", 128, eta=1.0), "flow"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.name}{value.steps}",
)
def test_samples_have_the_datas_distribution(solver, schedule):
    schedule = DiscreteSchedule.scaled_linear() if schedule == "sd" else SCHEDULES[schedule]
    x = sampled(solver, schedule)
    mean, covariance = PLANE.moments()
    assert torch.allclose(x.mean(0), mean, rtol=0, atol=0.08)  # four standard errors
    assert torch.allclose(x.T.cov(), covariance, rtol=0, atol=0.12)
    assert energy_p_value(x, PLANE.sample(2000, seed=8)[0]) > PROBABLE


def test_too_few_steps_are_found_out():
    """The test above can fail: its samples are enough to see a solver's error."""
    for solver in (Solver("euler", 8), Solver("sde", 8)):
        assert energy_p_value(sampled(solver, EDMSchedule()), PLANE.sample(2000, seed=8)[0]) < PROBABLE


@pytest.mark.parametrize(
    ("stochastic", "plain"),
    [(Solver("sde", 40), Solver("heun", 40)), (Solver("ddim", 40, eta=1.0), Solver("ddim", 40))],
)
def test_fresh_noise_makes_another_sample_of_the_same_start(stochastic, plain):
    schedule = EDMSchedule() if stochastic.name == "sde" else DiscreteSchedule.scaled_linear()
    one, two, deterministic = (
        sampled(stochastic, schedule, 50),
        sampled(stochastic, schedule, 50),
        sampled(plain, schedule, 50),
    )
    assert torch.equal(one, two)  # the same fresh noise
    assert (one - deterministic).norm(dim=1).median() > 0.2


def test_without_churn_the_stochastic_sampler_is_heuns():
    still = Solver("sde", 18, s_churn=0.0)
    assert torch.allclose(
        sampled(still, EDMSchedule(), 50), sampled(Solver("heun", 18), EDMSchedule(), 50), rtol=0, atol=1e-4
    )
