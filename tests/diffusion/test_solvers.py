import itertools
import math

import pytest
import torch

from d2o.diffusion.schedules import karras_sigmas
from d2o.diffusion.solvers import SOLVERS, get_solver, nfe
from d2o.errors import UserError
from tests.helpers import tiny_teacher

MU, S = 0.3, 0.5  # the data: N(MU, S^2) in every dimension


def gaussian_denoiser(x, sigma):
    """E[x_0 | x] for that data."""
    variance = sigma.to(torch.float64).reshape(-1, *[1] * (x.ndim - 1)) ** 2
    return (S**2 * x.to(torch.float64) + variance * MU) / (S**2 + variance)


def exact(x, sigma, to):
    """The probability-flow ODE's solution for that data, in closed form: distances to MU shrink with the marginal's deviation."""
    return MU + (x - MU) * math.sqrt((S**2 + to**2) / (S**2 + sigma**2))


def test_karras_sigmas_have_the_published_values():
    values = [80, 57.5860, 40.7856, 28.3746, 19.3525, 12.9101, 8.4009, 5.3152, 3.2568, 1.9233,
              1.0882, 0.5853, 0.2964, 0.1395, 0.0599, 0.0229, 0.0075, 0.0020, 0]  # fmt: skip
    sigmas = karras_sigmas(18)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (19,)
    assert torch.allclose(sigmas, torch.tensor(values, dtype=torch.float64), rtol=0, atol=5.1e-5)
    assert sigmas[0] == pytest.approx(80, abs=1e-9) and sigmas[17] == pytest.approx(0.002, abs=1e-12) and sigmas[18] == 0


def test_karras_sigmas_follow_their_arguments():
    linear = karras_sigmas(5, sigma_min=1, sigma_max=9, rho=1)
    assert linear.tolist() == [9, 7, 5, 3, 1, 0]
    assert karras_sigmas(1).tolist() == pytest.approx([80, 0])
    for bad in ({"steps": 0}, {"steps": 4, "sigma_min": 0}, {"steps": 4, "sigma_min": 3, "sigma_max": 2}):
        with pytest.raises(ValueError, match=r"steps|sigma"):
            karras_sigmas(**bad)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_one_step_is_one_denoiser_call(solver):
    teacher = tiny_teacher()
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 5, 9])
    with torch.inference_mode():
        called = teacher.denoise(80 * noise, 80.0, labels)
    assert torch.allclose(teacher.sample(noise, labels, solver=solver, steps=1), called, atol=1e-4)  # x - (x - D) at |x| of 200


@pytest.mark.parametrize(("solver", "steps", "calls"), [("heun", 18, 35), ("heun", 40, 79), ("heun", 1, 1), ("euler", 10, 10), ("euler", 1, 1)])
def test_nfe_counts_the_calls_that_are_made(solver, steps, calls):
    seen = []

    def denoise(x, sigma):
        assert x.dtype == sigma.dtype == torch.float32 and sigma.shape == (2,) and x.shape == (2, 3)
        seen.append(sigma[0].item())
        return gaussian_denoiser(x, sigma)

    x = get_solver(solver)(denoise, torch.ones(2, 3), karras_sigmas(steps))
    assert len(seen) == nfe(solver, steps) == calls
    assert x.dtype == torch.float64 and min(seen) > 0


def order(solver):
    """Observed order of convergence of the error at sigma 0.05, from a start at sigma 10."""
    start = torch.linspace(-20, 20, 7, dtype=torch.float64)[:, None]
    errors = []
    for steps in (16, 32, 64):
        sigmas = karras_sigmas(steps + 1, 0.05, 10.0)[:-1]
        x = SOLVERS[solver](gaussian_denoiser, start, sigmas)
        errors.append((x - exact(start, 10.0, 0.05)).abs().max().item())
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)], errors[-1]


def test_euler_converges_with_order_one():
    orders, error = order("euler")
    assert orders == pytest.approx([1, 1], abs=0.15) and error < 0.05


def test_heun_converges_with_order_two():
    orders, error = order("heun")
    assert orders == pytest.approx([2, 2], abs=0.15) and error < 2e-3


@pytest.mark.parametrize(("solver", "steps"), [("heun", 64), ("euler", 1000)])
def test_samples_have_the_datas_distribution(solver, steps):
    z = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = SOLVERS[solver](gaussian_denoiser, 80 * (z - z.mean()) / z.std(), karras_sigmas(steps))
    assert samples.mean().item() == pytest.approx(MU, abs=0.01)
    assert samples.std().item() == pytest.approx(S, rel=0.01)


def test_unknown_solver_names_the_known_ones():
    for ask in (get_solver, lambda name: nfe(name, 4)):
        with pytest.raises(UserError, match="unknown solver 'huen': did you mean 'heun'") as caught:
            ask("huen")
        assert "euler, heun" in caught.value.hint
