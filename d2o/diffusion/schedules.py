"""Noise levels: schedules t -> (alpha_t, sigma_t) with x_t = alpha_t x_0 + sigma_t eps, and the time steps that solvers
take through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject

SPACINGS = ("leading", "trailing", "linspace")
FINALS = ("scheduler", "x0")


@dataclass(frozen=True)
class Grid:
    """The points a solver visits, float64 [N + 1] on the CPU: x goes from point 0 (noise) to point N, the network is
    called at t[:-1] only.

    `start`: the solver begins with x = start * standard normal noise.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    start: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.t) - 1


class Schedule(Protocol):
    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def grid(self, steps: int, spacing: str | None = None, final: str = "scheduler") -> Grid: ...


Place = TypeVar("Place", Tensor, float)


def karras_sigma(down: Place, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Place:
    """The noise level at `down` of [0, 1], any shape: sigma_max at 0, sigma_min at 1 (Karras et al. 2022, eq. 5, where
    it is i / (N - 1)). Whoever counts upwards gives 1 - t."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + down * (low - high)) ** rho


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """sigma_0 = sigma_max > ... > sigma_{steps-1} = sigma_min > sigma_steps = 0, float64 [steps + 1] (Karras et al.
    2022, eq. 5).

    With one step only sigma_max and 0 remain. ValueError: steps < 1 or not 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not {sigma_min}, {sigma_max}")
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    sigmas = karras_sigma(ramp, sigma_min, sigma_max, rho)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@dataclass(frozen=True)
class EDMSchedule:
    """Variance exploding with t = sigma: alpha_t = 1, sigma_t = t (Karras et al. 2022, section 3).

    Sampling runs over [max(0.002, sigma_min), min(80, sigma_max)] (their Algorithm 1 with Table 1); `round_sigma` takes
    a noise level to the nearest that the network was trained on.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    round_sigma: Callable[[Tensor], Tensor] | None = None

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def grid(self, steps: int, spacing: str | None = None, final: str = "scheduler") -> Grid:
        """Karras' steps, the last of them to sigma 0. UserError: a `spacing` (they have their own)."""
        if spacing is not None:
            raise UserError(
                f"spacing {spacing!r}: a teacher of the EDM family takes Karras' steps", "leave --spacing away"
            )
        sigmas = karras_sigmas(steps, max(0.002, self.sigma_min), min(80.0, self.sigma_max))
        if self.round_sigma is not None:
            sigmas = torch.cat([self.round_sigma(sigmas[:-1]).to(torch.float64).cpu(), sigmas[-1:]])
        return Grid(sigmas, torch.ones_like(sigmas), sigmas, float(sigmas[0]))


@dataclass(frozen=True)
class DiscreteSchedule:
    """Variance preserving on integer time steps: alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) (Ho et al. 2020;
    Song et al. 2021, DDIM).

    `alphas_cumprod` float64 [T] is abar. `spacing` of the solver's steps and `offset` as in the teacher's own
    scheduler; `final_alpha` is the abar that the last step goes to (abar_0 for Stable Diffusion: a little noise stays;
    1 gives the prediction of x_0 itself).
    """

    alphas_cumprod: Tensor
    spacing: str = "leading"
    offset: int = 1
    final_alpha: float | None = None
    betas: JsonObject | None = None  # a diffusers scheduler's keys that say abar; None: only the numbers are known

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> DiscreteSchedule:
        """beta_t = (sqrt(beta_start) ... sqrt(beta_end) in equal steps)^2: Stable Diffusion 1.5 and XL."""
        keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        made = cls.from_config(dict(zip(keys, ("scaled_linear", beta_start, beta_end, steps), strict=True)))
        return cls(made.alphas_cumprod, betas=made.betas)

    @classmethod
    def from_config(cls, config: JsonObject) -> DiscreteSchedule:
        """From the configuration of a diffusers scheduler. UserError: betas or a rescaling that this schedule does not
        have."""
        steps, low, high = (
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", 1e-4),
            config.get("beta_end", 0.02),
        )
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif kind == "linear":
            betas = torch.linspace(low, high, steps, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64) ** 2
        elif kind == "squaredcos_cap_v2":
            at = torch.arange(steps + 1, dtype=torch.float64) / steps
            bar = torch.cos((at + 0.008) / 1.008 * torch.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            raise unknown("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if config.get("rescale_betas_zero_snr"):
            raise UserError("the scheduler rescales its betas to zero terminal SNR, which d2o does not support")
        if not len(betas):
            raise UserError("the scheduler has no time steps", "num_train_timesteps (or trained_betas) says how many")
        bar = torch.cumprod(1 - betas, 0)
        to_one = config.get("set_alpha_to_one", True)  # the defaults are those of diffusers' DDIMScheduler
        said = (
            {"trained_betas": list(config["trained_betas"])}
            if config.get("trained_betas") is not None
            else {"beta_schedule": kind, "beta_start": low, "beta_end": high, "num_train_timesteps": steps}
        )
        return cls(
            bar, config.get("timestep_spacing", "leading"), config.get("steps_offset", 0), 1.0 if to_one else None, said
        )

    def record(self) -> JsonObject:
        """A diffusers scheduler's keys for these betas, from which `from_config` has the same alphas_cumprod."""
        if self.betas is not None:
            return dict(self.betas)
        before = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        return {"trained_betas": (1 - self.alphas_cumprod / before).tolist()}

    def alpha(self, t: Tensor) -> Tensor:
        return self._bar(t).sqrt().to(torch.float32)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._bar(t)).sqrt().to(torch.float32)

    def _bar(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod.to(t.device, non_blocking=True)[t.round().long()]  # nothing waits for the device

    def grid(self, steps: int, spacing: str | None = None, final: str = "scheduler") -> Grid:
        """`spacing` "leading", "trailing" or "linspace" (default: the teacher's own); `final` "scheduler" or "x0": the
        last step goes to the prediction of x_0 itself. UserError: unknown, or more steps than the training had.

        Steps go from each time to the next. diffusers' DDIMScheduler goes T // steps down instead: the same for
        "leading", and for "trailing" where steps divide T; elsewhere it lands beside the time that it calls the network
        at next.
        """
        spacing = spacing or self.spacing
        total = len(self.alphas_cumprod)
        if spacing not in SPACINGS:
            raise unknown("spacing", spacing, SPACINGS)
        if final not in FINALS:
            raise unknown("final", final, FINALS)
        if not 1 <= steps <= total:
            raise UserError(f"steps must be from 1 to {total}, the teacher's training steps, not {steps}")
        if spacing == "leading":
            times = torch.arange(steps - 1, -1, -1) * (total // steps) + self.offset
        elif spacing == "trailing":
            times = (total - torch.arange(steps, dtype=torch.float64) * (total / steps)).round().long() - 1
        else:
            times = torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long()
        times = times.clamp(max=total - 1)
        bar = self.alphas_cumprod[times]
        last = 1.0 if final == "x0" else float(self.alphas_cumprod[0]) if self.final_alpha is None else self.final_alpha
        bar = torch.cat([bar, bar.new_tensor([last])])
        return Grid(
            torch.cat([times.to(torch.float64), torch.tensor([0.0], dtype=torch.float64)]), bar.sqrt(), (1 - bar).sqrt()
        )


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: x_t = (1 - t) x_0 + t eps, t in [0, 1] (Liu et al. 2022; Esser et al. 2024, eq. 13 and 23 for the
    shift)."""

    shift: float = 1.0
    train_steps: int = 1000

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def grid(self, steps: int, spacing: str | None = None, final: str = "scheduler") -> Grid:
        """Times from 1 down to 0, shifted towards the noise. diffusers' scheduler applies the shift to a range whose
        low end is shifted already; so do we, to give the same samples. UserError: a `spacing`, or steps < 1."""
        if spacing is not None:
            raise UserError(f"spacing {spacing!r}: a flow-matching teacher takes its own steps", "leave --spacing away")
        if steps < 1:
            raise UserError(f"steps must be at least 1, not {steps}")
        low = self._shifted(torch.tensor(1 / self.train_steps, dtype=torch.float64))
        times = self._shifted(torch.linspace(1.0, float(low), steps, dtype=torch.float64))
        times = torch.cat([times, times.new_zeros(1)])
        return Grid(times, 1 - times, times)

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)
