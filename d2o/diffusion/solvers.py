"""Solvers of the probability-flow ODE, for any schedule x_t = alpha_t x_0 + sigma_t eps.

With the denoiser D(x; t) = E[x_0 | x_t] and eps(x; t) = (x - alpha D) / sigma, the ODE reads dx = D dalpha + eps dsigma
(Song et al. 2021, eq. 13; Karras et al. 2022, eq. 4; for alpha = 1 their eq. 1). One Euler step of it, x' = alpha' D +
sigma' eps, is DDIM's step.

The state is float64; the network is given float32. Time steps are plain numbers: nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor

from d2o.diffusion.schedules import FINALS, SPACINGS, EDMSchedule, Grid, Schedule
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x float32 [B, ...], t float32 [B]) -> x_0 [B, ...]."""
Randn = Callable[[], Tensor]
"""Standard normal noise [B, ...], every sample's from its own generator."""


def _float64(randn: Randn, x: Tensor) -> Tensor:
    return randn().to(x.device, torch.float64)


def _call(denoise: Denoise, x: Tensor, t: float) -> Tensor:
    return denoise(x.to(torch.float32), torch.full((len(x),), t, dtype=torch.float32, device=x.device)).to(
        torch.float64
    )


def _points(grid: Grid) -> list[tuple[float, float, float]]:
    return list(zip(grid.t.tolist(), grid.alpha.tolist(), grid.sigma.tolist(), strict=True))


def _step(
    x: Tensor, d: Tensor, eps: Tensor, alpha: float, sigma: float, alpha_next: float, sigma_next: float
) -> Tensor:
    """x + D dalpha + eps dsigma."""
    x = x + (sigma_next - sigma) * eps
    return x if alpha_next == alpha else x + (alpha_next - alpha) * d


def euler(denoise: Denoise, x: Tensor, grid: Grid) -> Tensor:
    """First order. x [B, ...] at the grid's first point -> x at its last, float64."""
    x, points = x.to(torch.float64), _points(grid)
    for (t, a, s), (_, a_next, s_next) in pairwise(points):
        d = _call(denoise, x, t)
        x = _step(x, d, (x - a * d) / s, a, s, a_next, s_next)
    return x


def heun(denoise: Denoise, x: Tensor, grid: Grid) -> Tensor:
    """Second order (the trapezoidal rule for D dalpha + eps dsigma), Euler on the last step: Karras et al. 2022,
    Algorithm 1."""
    x, points = x.to(torch.float64), _points(grid)
    for i, ((t, a, s), (t_next, a_next, s_next)) in enumerate(pairwise(points)):
        d = _call(denoise, x, t)
        eps = (x - a * d) / s
        x_next = _step(x, d, eps, a, s, a_next, s_next)
        if i < grid.steps - 1:
            d_next = _call(denoise, x_next, t_next)
            eps_next = (x_next - a_next * d_next) / s_next
            x_next = _step(x, 0.5 * d + 0.5 * d_next, 0.5 * eps + 0.5 * eps_next, a, s, a_next, s_next)
        x = x_next
    return x


def ddim(denoise: Denoise, x: Tensor, grid: Grid, eta: float = 0.0, randn: Randn | None = None) -> Tensor:
    """Song et al. 2021 (DDIM), eq. 12: `eta` 0 is deterministic (and `euler`), 1 is the ancestral sampler of DDPM."""
    if eta == 0:
        return euler(denoise, x, grid)
    assert randn is not None
    x, points = x.to(torch.float64), _points(grid)
    for (t, a, s), (_, a_next, s_next) in pairwise(points):
        d = _call(denoise, x, t)
        eps = (x - a * d) / s
        # Their sigma_t = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar'), written for any alpha and sigma.
        fresh = eta * s_next * math.sqrt(max(0.0, 1 - (s_next * a / (a_next * s)) ** 2))
        x = a_next * d + math.sqrt(s_next**2 - fresh**2) * eps + fresh * _float64(randn, x)
    return x


def dpmpp(denoise: Denoise, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: second order with one network call a step.

    The first step is of first order; so is the last where it goes to sigma 0, or in fewer than 15 steps (diffusers'
    rule).
    """
    x, points = x.to(torch.float64), _points(grid)
    before: tuple[Tensor, float] | None = None
    for i, ((t, a, s), (_, a_next, s_next)) in enumerate(pairwise(points)):
        d = _call(denoise, x, t)
        h = _half_log_snr(a_next, s_next) - _half_log_snr(a, s)
        data, last = d, i == grid.steps - 1
        if before is not None and before[1] != 0 and not (last and (s_next == 0 or grid.steps < 15)):
            d_before, h_before = before  # h_before is 0 where two points of the grid are the same noise level
            data = d + (d - d_before) * (h / (2 * h_before))
        x = (s_next / s) * x + (a_next - a * s_next / s) * data  # alpha' (1 - e^-h) = alpha' - alpha sigma' / sigma
        before = d, h
    return x


def _half_log_snr(alpha: float, sigma: float) -> float:
    if alpha == 0 or sigma == 0:
        return -math.inf if alpha == 0 else math.inf
    return math.log(alpha / sigma)


def sde(
    denoise: Denoise,
    x: Tensor,
    grid: Grid,
    schedule: EDMSchedule,
    randn: Randn,
    churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
) -> Tensor:
    """EDM's stochastic sampler, Karras et al. 2022, Algorithm 2: before every Heun step the noise level is raised by
    fresh noise."""
    x, sigmas = x.to(torch.float64), grid.sigma.tolist()
    most = min(churn / grid.steps, math.sqrt(2) - 1)
    for i, (s, s_next) in enumerate(pairwise(sigmas)):
        raised = s * (1 + (most if s_min <= s <= s_max else 0.0))
        if schedule.round_sigma is not None:
            raised = float(schedule.round_sigma(torch.tensor(raised, dtype=torch.float64)))
        x = x + math.sqrt(max(0.0, raised**2 - s**2)) * s_noise * _float64(randn, x)
        slope = (x - _call(denoise, x, raised)) / raised
        x_next = x + (s_next - raised) * slope
        if i < grid.steps - 1:
            x_next = x + (s_next - raised) * (0.5 * slope + 0.5 * (x_next - _call(denoise, x_next, s_next)) / s_next)
        x = x_next
    return x


SOLVERS = ("heun", "euler", "ddim", "dpmpp", "sde")
PLAIN = {"heun": heun, "euler": euler, "dpmpp": dpmpp}


@dataclass(frozen=True)
class Solver:
    """A solver and everything that its result depends on. `spacing` and `final` as the schedules take them; `eta` is
    ddim's; the last four are the sde's (Karras et al. 2022, Table 5, ImageNet-64; their churn for CIFAR pairs is not
    published)."""

    name: str = "heun"
    steps: int = 18
    spacing: str | None = None
    final: str = "scheduler"
    eta: float = 0.0
    s_churn: float = 40.0
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003

    def check(self) -> None:
        """UserError: unknown name, spacing or final (with the known ones), a number out of range, `eta` for another
        solver than ddim."""
        if self.name not in SOLVERS:
            raise unknown("solver", self.name, SOLVERS)
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise unknown("spacing", self.spacing, SPACINGS)
        if self.final not in FINALS:
            raise unknown("final", self.final, FINALS)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must lie between 0 and 1, not {self.eta}")
        if self.eta and self.name != "ddim":
            raise UserError(f"eta {self.eta:g}: only the solver ddim takes it, not {self.name}")
        for key in ("s_churn", "s_min", "s_max", "s_noise"):
            if not getattr(self, key) >= 0:
                raise UserError(f"{key} must not be negative: {getattr(self, key)}")

    @property
    def nfe(self) -> int:
        """Denoiser evaluations per sample as the papers count them: 2 steps - 1 for Heun (also stochastic), else steps.
        A guided evaluation counts once here (Kang et al. 2024, Table A1), though the network runs twice: see
        `forwards`."""
        return 2 * self.steps - 1 if self.name in ("heun", "sde") else self.steps

    def forwards(self, cfg: float = 1.0) -> int:
        """Network passes per sample: with guidance two per evaluation."""
        return self.nfe * (1 if cfg == 1 else 2)

    @property
    def stochastic(self) -> bool:
        """True where `run` needs fresh noise in every step."""
        return self.name == "sde" or self.eta > 0

    def grid(self, schedule: Schedule) -> Grid:
        """The points that it visits on that schedule. UserError: as `check`, or a schedule that it does not fit."""
        self.check()
        if self.name == "sde" and not isinstance(schedule, EDMSchedule):
            raise UserError(
                "solver sde raises the noise level sigma: it is for the EDM family",
                "for this teacher: --solver ddim --eta 1",
            )
        return schedule.grid(self.steps, self.spacing, self.final)

    def run(self, denoise: Denoise, noise: Tensor, schedule: Schedule, randn: Randn | None = None) -> Tensor:
        """Standard normal noise [B, ...] -> x at the schedule's end, float64. UserError: as `check`, or a schedule that
        it does not fit."""
        grid = self.grid(schedule)
        x = noise.to(torch.float64) * grid.start
        if self.stochastic and randn is None:
            raise UserError(
                f"solver {self.name}{f' with eta {self.eta:g}' if self.eta else ''} needs fresh noise for every step"
            )
        if self.name == "sde":
            assert isinstance(schedule, EDMSchedule) and randn is not None
            return sde(denoise, x, grid, schedule, randn, self.s_churn, self.s_min, self.s_max, self.s_noise)
        if self.name == "ddim":
            return ddim(denoise, x, grid, self.eta, randn)
        return PLAIN[self.name](denoise, x, grid)

    def to_dict(self) -> JsonObject:
        """What matters: the defaults of options that this solver does not take are left away."""
        record = asdict(self)
        if self.name != "ddim":
            del record["eta"]
        if self.name != "sde":
            record = {key: value for key, value in record.items() if not key.startswith("s_")}
        return record


def get_solver(name: str, steps: int = 18) -> Solver:
    """The solver of that name with its defaults. UserError names the known ones."""
    solver = Solver(name, steps)
    solver.check()
    return solver
