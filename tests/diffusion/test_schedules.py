import math

import pytest
import torch

from d2o.diffusion.schedules import SPACINGS, DiscreteSchedule, EDMSchedule, FlowSchedule, Grid, karras_sigmas
from d2o.diffusion.solvers import Solver, dpmpp
from d2o.errors import UserError
from d2o.interop import torchvision_compat
from tests.diffusion.mixture import PLANE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # numpy's, of theirs
torchvision_compat.ensure()
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler  # noqa: E402

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def test_karras_sigmas_have_the_published_values():
    values = [
        80,
        57.5860,
        40.7856,
        28.3746,
        19.3525,
        12.9101,
        8.4009,
        5.3152,
        3.2568,
        1.9233,
        1.0882,
        0.5853,
        0.2964,
        0.1395,
        0.0599,
        0.0229,
        0.0075,
        0.0020,
        0,
    ]
    sigmas = karras_sigmas(18)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (19,)
    assert torch.allclose(sigmas, torch.tensor(values, dtype=torch.float64), rtol=0, atol=5.1e-5)
    assert (
        sigmas[0] == pytest.approx(80, abs=1e-9) and sigmas[17] == pytest.approx(0.002, abs=1e-12) and sigmas[18] == 0
    )


def test_karras_sigmas_follow_their_arguments():
    linear = karras_sigmas(5, sigma_min=1, sigma_max=9, rho=1)
    assert linear.tolist() == [9, 7, 5, 3, 1, 0]
    assert karras_sigmas(1).tolist() == pytest.approx([80, 0])
    for bad in ({"steps": 0}, {"steps": 4, "sigma_min": 0}, {"steps": 4, "sigma_min": 3, "sigma_max": 2}):
        with pytest.raises(ValueError, match=r"steps|sigma"):
            karras_sigmas(**bad)


def test_the_edm_grid_is_karras_steps_within_what_the_network_knows():
    grid = EDMSchedule().grid(18)
    assert torch.equal(grid.sigma, karras_sigmas(18)) and torch.equal(grid.t, grid.sigma) and grid.alpha.eq(1).all()
    assert grid.steps == 18 and grid.start == pytest.approx(80)
    assert torch.equal(EDMSchedule(0.0, math.inf).grid(18).sigma, karras_sigmas(18))
    narrow = EDMSchedule(0.02, 50.0).grid(4).sigma
    assert narrow[0] == pytest.approx(50) and narrow[-2] == pytest.approx(0.02)
    levels = torch.tensor([0.1, 1.0, 10.0, 60.0], dtype=torch.float64)
    rounded = EDMSchedule(round_sigma=lambda sigma: levels[(sigma[:, None] - levels).abs().argmin(1)]).grid(12)
    assert set(rounded.sigma[:-1].tolist()) == set(levels.tolist()) and rounded.sigma[-1] == 0 and rounded.start == 60
    with pytest.raises(UserError, match="spacing 'trailing': a teacher of the EDM family takes Karras' steps"):
        EDMSchedule().grid(18, "trailing")


def test_stable_diffusions_numbers():
    schedule = DiscreteSchedule.scaled_linear()
    t = torch.tensor([999.0, 981.0, 0.0])
    bar = schedule.alphas_cumprod[t.long()]
    assert bar.dtype == torch.float64 and bar.tolist() == pytest.approx(
        [0.004660098513, 0.005775500139, 0.99915], rel=1e-9
    )
    assert schedule.alpha(t).dtype == schedule.sigma(t).dtype == torch.float32
    assert schedule.alpha(t).tolist() == pytest.approx([0.0682649142, 0.0759967114, 0.9995749096], rel=1e-6)
    assert schedule.sigma(t).tolist() == pytest.approx([0.9976672298, 0.9971080683, 0.0291547595], rel=1e-6)
    assert torch.equal(schedule.alpha(t.long()), schedule.alpha(t)) and schedule.alpha(t.reshape(3, 1)).shape == (3, 1)

    grid = schedule.grid(50)
    assert grid.t[:-1].tolist() == list(range(981, 0, -20)) and grid.start == 1
    assert grid.alpha[-1] ** 2 == pytest.approx(0.99915, rel=1e-9) and grid.sigma[-1] == pytest.approx(
        0.0291547595, rel=1e-8
    )
    assert torch.allclose(grid.alpha**2 + grid.sigma**2, torch.ones(51, dtype=torch.float64), atol=1e-15)
    linspace = schedule.grid(50, "linspace").t
    assert (
        linspace[0] == 999 and linspace[49] == 0 and linspace.diff().min() == -21 and linspace[:50].diff().max() == -20
    )
    assert schedule.grid(50, "trailing").t[:-1].tolist() == list(range(999, 18, -20))
    ends = schedule.grid(50, final="x0")
    assert ends.alpha[-1] == 1 and ends.sigma[-1] == 0 and torch.equal(ends.sigma[:-1], grid.sigma[:-1])


def test_a_discrete_grid_refuses_what_it_cannot_do():
    schedule = DiscreteSchedule.scaled_linear()
    with pytest.raises(UserError, match="unknown spacing 'leeding': did you mean 'leading'"):
        schedule.grid(10, "leeding")
    with pytest.raises(UserError, match="unknown final 'x1'"):
        schedule.grid(10, final="x1")
    for steps in (0, 1001):
        with pytest.raises(UserError, match=f"steps must be from 1 to 1000, the teacher's training steps, not {steps}"):
            schedule.grid(steps)
    for spacing in SPACINGS:
        assert schedule.grid(1000, spacing).t[:-1].max() == 999  # within the table


@pytest.mark.parametrize(
    "config",
    [
        {},
        SD,
        {**SD, "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {**BETAS, "num_train_timesteps": 500},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"beta_start": 0.001, "beta_end": 0.03, "set_alpha_to_one": False},
    ],
)
def test_a_schedule_from_diffusers_configuration_is_that_schedulers(config):
    theirs, ours = DDIMScheduler.from_config(config), DiscreteSchedule.from_config(config)
    assert torch.allclose(
        ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-9
    )  # theirs is float32
    theirs.set_timesteps(3)
    grid = ours.grid(3)
    assert grid.t[:-1].tolist() == theirs.timesteps.clamp(max=len(ours.alphas_cumprod) - 1).tolist()
    assert grid.alpha[-1] ** 2 == pytest.approx(float(theirs.final_alpha_cumprod), rel=1e-6)


def test_a_scheduler_that_would_give_other_samples_is_refused():
    with pytest.raises(UserError, match="unknown beta_schedule 'sigmoid'") as caught:
        DiscreteSchedule.from_config({"beta_schedule": "sigmoid"})
    assert "scaled_linear" in caught.value.hint
    with pytest.raises(UserError, match="zero terminal SNR"):
        DiscreteSchedule.from_config({"rescale_betas_zero_snr": True})


@pytest.mark.parametrize("spacing", SPACINGS)
def test_time_steps_are_those_of_diffusers(spacing):
    theirs, ours = (
        DDIMScheduler(**SD, timestep_spacing=spacing),
        DiscreteSchedule.from_config({**SD, "timestep_spacing": spacing}),
    )
    for steps in (*range(2, 48), 50, 100, 125, 200, 250, 500):
        theirs.set_timesteps(steps)
        assert torch.equal(ours.grid(steps).t[:-1].long(), theirs.timesteps), steps


def on_our_table(scheduler, schedule):
    """One of diffusers' schedulers with our table of abar.

    Theirs is a float32 product of 1,000 factors, so each entry may be off by 1,000 x 2^-24, and how much it is depends
    on the processor. At the last steps 1 - abar is 8.5e-4, and that error grows a thousandfold. On one table both
    compute in float64; what is left is that the network's input, rounded to float32, may fall on the other side: 2^-24
    x 4 (|x| < 4) a step, times a response below 1. Hence 1e-6.
    """
    assert torch.allclose(scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1000 * 2**-24, atol=0)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = schedule.alphas_cumprod[0]
    return scheduler


def predicted_noise(denoise, schedule, x, t):
    """What a network that predicts noise says at the whole time step t: eps = (x_t - alpha_t x_0) / sigma_t, in
    float64."""
    bar = schedule.alphas_cumprod[int(t)]
    return (x - bar.sqrt() * denoise(x.float(), torch.full((len(x),), float(t)))) / (1 - bar).sqrt()


def their_samples(scheduler, schedule, z):
    """z through one of diffusers' schedulers that take the predicted noise, in float64 but for the network's input."""
    x, denoise = z.double(), PLANE.denoiser(schedule)
    for t in scheduler.timesteps:
        x = scheduler.step(predicted_noise(denoise, schedule, x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 50), ("leading", 30), ("leading", 1), ("trailing", 50), ("trailing", 4)]
)
def test_ddim_samples_are_those_of_diffusers(spacing, steps):
    z, schedule = (
        torch.randn(16, 2, generator=torch.Generator().manual_seed(1)),
        DiscreteSchedule.from_config({**SD, "timestep_spacing": spacing}),
    )
    theirs = on_our_table(DDIMScheduler(**SD, timestep_spacing=spacing), schedule)
    theirs.set_timesteps(steps)
    ours = Solver("ddim", steps).run(PLANE.denoiser(schedule), z, schedule)
    assert torch.allclose(ours, their_samples(theirs, schedule, z), rtol=0, atol=1e-6)
    theirs.final_alpha_cumprod = torch.tensor(1.0)  # set_alpha_to_one
    ours = Solver("ddim", steps, final="x0").run(PLANE.denoiser(schedule), z, schedule)
    assert torch.allclose(ours, their_samples(theirs, schedule, z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_is_that_of_diffusers(eta):
    z, schedule = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)), DiscreteSchedule.from_config(SD)
    theirs, denoise = on_our_table(DDIMScheduler(**SD), schedule), PLANE.denoiser(schedule)
    theirs.set_timesteps(20)
    fresh = [torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    x = z.double()
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(
            predicted_noise(denoise, schedule, x, t), int(t), x, eta=eta, variance_noise=fresh[i]
        ).prev_sample
    draws = iter(fresh)
    assert torch.allclose(
        Solver("ddim", 20, eta=eta).run(denoise, z, schedule, lambda: next(draws)), x, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("steps", [10, 20])  # below 15 steps the last one is of first order
@pytest.mark.parametrize(("theirs", "ours"), [("sigma_min", "scheduler"), ("zero", "x0")])
def test_dpmpp_samples_are_those_of_diffusers(steps, theirs, ours):
    """Theirs keeps sigmas in float32, and takes logarithms and differences of them: a relative 2^-24 of each, up to
    3e-6 in h here."""
    z, schedule = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)), DiscreteSchedule.from_config(SD)
    scheduler = on_our_table(DPMSolverMultistepScheduler(**BETAS, solver_order=2, final_sigmas_type=theirs), schedule)
    scheduler.set_timesteps(
        timesteps=schedule.grid(steps).t[:-1].int().tolist()
    )  # theirs counts the steps of a spacing in another way
    x = Solver("dpmpp", steps, final=ours).run(PLANE.denoiser(schedule), z, schedule)
    assert torch.allclose(x, their_samples(scheduler, schedule, z), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_steps_and_samples_are_those_of_diffusers(shift, steps):
    z, schedule = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)), FlowSchedule(shift)
    theirs, denoise = FlowMatchEulerDiscreteScheduler(shift=shift), PLANE.denoiser(schedule)
    theirs.set_timesteps(steps)
    grid = schedule.grid(steps)
    assert grid.sigma.tolist() == pytest.approx(theirs.sigmas.tolist(), abs=3e-7) and grid.start == 1
    assert torch.equal(grid.t, grid.sigma) and torch.equal(grid.alpha, 1 - grid.t)
    x = z
    for t in theirs.timesteps:
        time = (t / 1000).expand(16)
        x = theirs.step((x - denoise(x, time).float()) / time[:, None], t, x).prev_sample
    assert torch.allclose(Solver("euler", steps).run(denoise, z, schedule), x.double(), rtol=0, atol=2e-6)


def test_dpmpp_samples_of_a_flow_are_those_of_diffusers():
    """On their own times: these leave pure noise and the last short step out."""
    z, denoise = torch.randn(16, 2, generator=torch.Generator().manual_seed(1)), PLANE.denoiser(FlowSchedule())
    theirs = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", solver_order=2
    )
    theirs.set_timesteps(20)
    x = z.double()
    for sigma, t in zip(theirs.sigmas.double(), theirs.timesteps, strict=False):
        x = theirs.step((x - denoise(x.float(), sigma.expand(16))) / sigma, t, x).prev_sample
    sigmas = theirs.sigmas.double()
    assert torch.allclose(dpmpp(denoise, z, Grid(sigmas, 1 - sigmas, sigmas)), x, rtol=0, atol=1e-5)


def test_a_flow_grid_refuses_a_spacing_and_no_steps():
    with pytest.raises(UserError, match="takes its own steps"):
        FlowSchedule().grid(10, "leading")
    with pytest.raises(UserError, match="steps must be at least 1, not 0"):
        FlowSchedule().grid(0)
