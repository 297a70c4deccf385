import math
from itertools import pairwise

import pytest
import torch

from d2o.diffusion.noise import StepNoise, noise_and_labels
from d2o.diffusion.schedules import DiscreteSchedule, EDMSchedule, FlowSchedule, Grid
from d2o.diffusion.solvers import SOLVERS, Solver, ddim, dpmpp, euler, get_solver, heun
from d2o.errors import UserError
from tests.diffusion.mixture import PLANE, MixtureTeacher
from tests.helpers import tiny_teacher

SD = DiscreteSchedule.scaled_linear()
SCHEDULES = {"edm": EDMSchedule(), "sd": SD, "flow": FlowSchedule(), "shifted": FlowSchedule(3.0)}


def fresh(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim", "dpmpp"])
def test_one_step_is_one_denoiser_call(solver):
    teacher = tiny_teacher()
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 5, 9])
    with torch.inference_mode():
        called = teacher.denoise(80 * noise, 80.0, labels)
    assert torch.allclose(
        teacher.sample(noise, labels, solver=solver, steps=1), called, atol=1e-4
    )  # x - (x - D) at |x| of 200


COUNTS = [
    ("heun", 18, 35),
    ("heun", 40, 79),
    ("heun", 1, 1),
    ("euler", 10, 10),
    ("euler", 1, 1),
    ("ddim", 50, 50),
    ("dpmpp", 20, 20),
]


@pytest.mark.parametrize(
    ("solver", "steps", "calls", "schedule"),
    [
        *((*count, schedule) for count in COUNTS for schedule in SCHEDULES),
        ("sde", 18, 35, "edm"),
        ("sde", 256, 511, "edm"),
    ],
)
def test_nfe_counts_the_calls_that_are_made(solver, steps, calls, schedule):
    schedule = SCHEDULES[schedule]
    seen, denoise = [], PLANE.denoiser(schedule)

    def counted(x, t):
        assert x.dtype == t.dtype == torch.float32 and t.shape == (2,) and x.shape == (2, 2)
        seen.append(t[0].item())
        return denoise(x, t)

    run = get_solver(solver, steps)
    x = run.run(counted, torch.ones(2, 2), schedule, fresh((2, 2)))
    assert (
        len(seen) == get_solver(solver, steps).nfe == run.nfe == run.forwards() == calls
        and run.forwards(3.0) == 2 * calls
    )
    assert x.dtype == torch.float64 and x.isfinite().all() and min(seen) > 0
    if solver in ("euler", "ddim", "dpmpp"):
        assert seen == schedule.grid(steps).t[:-1].float().tolist()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_without_fresh_noise_is_euler_to_the_bit(schedule):
    z, denoise = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), PLANE.denoiser(schedule)
    x = Solver("ddim", 20).run(denoise, z, schedule)
    assert torch.equal(x, Solver("euler", 20).run(denoise, z, schedule))
    grid, start = schedule.grid(20), z.double() * schedule.grid(20).start
    assert torch.equal(x, ddim(denoise, start, grid)) and torch.equal(x, euler(denoise, start, grid))
    almost = ddim(denoise, start, grid, 1e-9, fresh((20, 2)))  # the formula with noise goes over into it
    assert torch.allclose(almost, x, rtol=0, atol=1e-5)


def scaled(schedule, steps):
    """The grid of `schedule` in y = x / alpha, r = sigma / alpha, and the denoiser in these coordinates."""
    grid, denoise = schedule.grid(steps), PLANE.denoiser(schedule)
    ratio = grid.sigma / grid.alpha
    place = {r: (float(t), float(a)) for r, t, a in zip(ratio.float().tolist(), grid.t, grid.alpha, strict=True)}

    def rescaled(y, r):
        t, alpha = place[r[0].item()]
        return denoise((y.double() * alpha).float(), torch.full_like(r, t))

    return grid, Grid(ratio, torch.ones_like(ratio), ratio), rescaled


@pytest.mark.parametrize("solve", [euler, dpmpp])
def test_first_order_steps_and_exponential_ones_do_not_depend_on_the_scale(solve):
    """DDIM, eq. 13 and 14 (Song et al. 2021): its steps are Euler's of d(x / alpha) = eps d(sigma / alpha)."""
    grid, ratios, rescaled = scaled(SD, 20)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = solve(PLANE.denoiser(SD), x, grid)
    assert torch.allclose(solve(rescaled, x / grid.alpha[0], ratios) * grid.alpha[-1], plain, rtol=0, atol=2e-5)
    assert not torch.allclose(plain, heun(PLANE.denoiser(SD), x, grid), atol=1e-3)


def test_the_last_step_goes_to_the_schedulers_end_or_to_the_data():
    z, denoise = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), PLANE.denoiser(SD)
    seen = []

    def recorded(x, t):
        seen.append((x.double(), denoise(x, t)))
        return seen[-1][1]

    end = Solver("ddim", 50).run(recorded, z, SD)
    (alpha, sigma), (x, data) = (SD.alpha(torch.ones(1)).double(), SD.sigma(torch.ones(1)).double()), seen[-1]
    assert torch.allclose(end, 0.9995749096 * data + 0.0291547595 * (x - alpha * data) / sigma, rtol=0, atol=1e-5)
    assert torch.allclose(Solver("ddim", 50, final="x0").run(denoise, z, SD), data, rtol=0, atol=1e-12)
    assert torch.allclose(Solver("dpmpp", 50, final="x0").run(recorded, z, SD), seen[-1][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("steps", [40, 256])  # churn 40 / N is more than sqrt(2) - 1 below 97 steps
def test_the_stochastic_sampler_is_edms_algorithm_2(labelled, steps):
    teacher, seeds, classes = MixtureTeacher(labelled=labelled), [3, 14, 2**32 + 159], 3 if labelled else 0
    noise, labels = noise_and_labels(seeds, (2, 1, 1), classes)
    solver = Solver("sde", steps)
    x = teacher.sample(noise, labels if labelled else None, solver, randn=StepNoise(seeds, (2, 1, 1), classes))
    assert len(teacher.calls) == 2 * steps - 1

    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    t = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed % 2**32)
        latent = torch.randn(2, 1, 1, generator=generator)
        label = torch.randint(3, (), generator=generator).reshape(1) if labelled else None
        state = latent.double()[None] * t[0]

        def denoised(state, sigma, label=label):
            return teacher.denoise(state.float(), sigma, label).double()

        for now, after in pairwise(t):
            gamma = min(40 / steps, math.sqrt(2) - 1) if 0.05 <= now <= 50 else 0.0
            raised = now + gamma * now
            state = state + math.sqrt(raised**2 - now**2) * 1.003 * torch.randn(
                2, 1, 1, generator=generator, dtype=torch.float64
            )
            slope = (state - denoised(state, raised)) / raised
            moved = state + (after - raised) * slope
            if after > 0:
                moved = state + (after - raised) * (slope + (moved - denoised(moved, after)) / after) / 2
            state = moved
        assert torch.allclose(x[row], state[0].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "solver",
    [Solver("heun", 6), Solver("dpmpp", 6), Solver("sde", 6), Solver("ddim", 6, eta=1.0)],
    ids=lambda solver: solver.name,
)
@pytest.mark.parametrize("kind", ["network", "mixture"])
def test_a_sample_does_not_depend_on_its_batch(solver, kind):
    if kind == "network":
        teacher = tiny_teacher()
    else:
        teacher = MixtureTeacher(schedule=SD if solver.name in ("ddim", "dpmpp") else None)
    shape, classes, seeds = teacher.spec.shape, teacher.spec.classes, [5, 9, 2, 77, 31]

    def sample(seeds):
        noise, labels = noise_and_labels(seeds, shape, classes)
        return teacher.sample(
            noise, labels, solver, cfg=1.5, randn=StepNoise(seeds, shape, classes) if solver.stochastic else None
        )

    together = sample(seeds)
    for i, seed in enumerate(seeds):
        assert torch.allclose(sample([seed])[0], together[i], rtol=0, atol=2e-5)
    assert torch.allclose(sample(seeds[::-1]).flip(0), together, rtol=0, atol=2e-5)


def test_repeated_noise_levels_do_no_harm():
    """A thousand leading steps with offset 1 begin at 999 twice; rounding to iDDPM's levels repeats some, too."""
    levels = torch.logspace(-2, 1.9, 12, dtype=torch.float64)
    rounded = EDMSchedule(round_sigma=lambda sigma: levels[(sigma[..., None] - levels).abs().argmin(-1)])
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for schedule, steps, names in ((SD, 1000, ["dpmpp"]), (rounded, 60, ["euler", "heun", "dpmpp", "ddim"])):
        assert (schedule.grid(steps).sigma.diff() == 0).any()
        for name in names:
            solver = Solver(name, steps, eta=1.0 if name == "ddim" else 0.0)
            x = solver.run(PLANE.denoiser(schedule), z, schedule, fresh((5, 2)))
            assert x.isfinite().all() and x.abs().max() < 3
    assert Solver("sde", 60).run(PLANE.denoiser(rounded), z, rounded, fresh((5, 2))).abs().max() < 3


def test_what_a_solver_records():
    assert Solver("heun", 18).to_dict() == {"name": "heun", "steps": 18, "spacing": None, "final": "scheduler"}
    assert Solver("ddim", 50, "leading", eta=1.0).to_dict() == {
        "name": "ddim",
        "steps": 50,
        "spacing": "leading",
        "final": "scheduler",
        "eta": 1.0,
    }
    sde = Solver("sde", 256)
    assert (
        Solver(**sde.to_dict()) == sde
        and {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}.items() <= sde.to_dict().items()
    )
    assert [name for name in SOLVERS if Solver(name).stochastic] == ["sde"] and Solver("ddim", eta=0.1).stochastic


def test_unknown_solver_names_the_known_ones():
    for ask in (
        get_solver,
        lambda name: get_solver(name, 4),
        lambda name: tiny_teacher().sample(torch.zeros(1, 1, 8, 8), torch.tensor([0]), name),
    ):
        with pytest.raises(UserError, match="unknown solver 'huen': did you mean 'heun'") as caught:
            ask("huen")
        assert "ddim, dpmpp, euler, heun, sde" in caught.value.hint


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (Solver("heun", 0), "steps must be at least 1, not 0"),
        (Solver("ddim", 10, spacing="trialing"), "unknown spacing 'trialing': did you mean 'trailing'"),
        (Solver("ddim", 10, final="x_0"), "unknown final 'x_0': did you mean 'x0'"),
        (Solver("ddim", 10, eta=1.5), "eta must lie between 0 and 1, not 1.5"),
        (Solver("ddim", 10, eta=math.nan), "eta must lie between 0 and 1"),
        (Solver("heun", 10, eta=0.5), "eta 0.5: only the solver ddim takes it, not heun"),
        (Solver("sde", 10, s_churn=-1.0), "s_churn must not be negative: -1"),
        (Solver("sde", 10, s_noise=math.nan), "s_noise must not be negative: nan"),
    ],
)
def test_mistakes_are_named(solver, words):
    with pytest.raises(UserError, match=words):
        solver.check()
    with pytest.raises(UserError, match=words):
        solver.run(PLANE.denoiser(SD), torch.zeros(1, 2), SD)


def test_a_solver_that_does_not_fit_says_so():
    z, edm = torch.zeros(1, 2), EDMSchedule()
    with pytest.raises(UserError, match="solver sde needs fresh noise for every step"):
        Solver("sde").run(PLANE.denoiser(edm), z, edm)
    with pytest.raises(UserError, match="solver ddim with eta 0.5 needs fresh noise"):
        Solver("ddim", eta=0.5).run(PLANE.denoiser(edm), z, edm)
    for schedule in (SD, FlowSchedule()):
        with pytest.raises(UserError, match="it is for the EDM family") as caught:
            Solver("sde").run(PLANE.denoiser(schedule), z, schedule)
        assert "--eta 1" in caught.value.hint
    with pytest.raises(UserError, match="takes Karras' steps"):
        Solver("heun", spacing="leading").run(PLANE.denoiser(edm), z, edm)
    with pytest.raises(UserError, match="steps must be from 1 to 1000"):
        Solver("ddim", 2000).run(PLANE.denoiser(SD), z, SD)
