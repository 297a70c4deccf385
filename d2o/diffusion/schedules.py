"""Noise levels: time-step grids, and schedules t -> (alpha_t, sigma_t) with x_t = alpha_t x_0 + sigma_t eps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """sigma_0 = sigma_max > ... > sigma_{steps-1} = sigma_min > sigma_steps = 0, float64 [steps + 1] (Karras et al. 2022, eq. 5).

    With one step only sigma_max and 0 remain. ValueError: steps < 1 or not 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not {sigma_min}, {sigma_max}")
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@dataclass(frozen=True)
class EDMSchedule:
    """Variance exploding with t = sigma: alpha_t = 1, sigma_t = t (Karras et al. 2022, section 3)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t
