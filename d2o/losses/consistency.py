"""Targets, distances and schedules of consistency distillation (Song et al. 2023), progressive distillation (Salimans &
Ho 2022) and consistency trajectory models (Kim et al. 2024), in the unified notation of Zheng & Yang 2024 (eq. 5 and
Table 5).

x_t = x + t z; T(i, N), i = 0 .. N, are noise levels from sigma_min up to sigma_max; F(x_t, t, s) is where a network
takes x_t on the probability-flow ODE from t down to s. Times are tensors [B], samples [B, C, H, W], losses and
distances [B].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from d2o.diffusion.schedules import karras_sigma
from d2o.diffusion.solvers import Denoise

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
WEIGHTS = ("uniform", "inverse_gap", "truncated_snr")


# ---- noise levels ----------------------------------------------------------------------------------------------------


def karras_time(
    i: Tensor, n: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """T(i, N) = (sigma_max^(1/rho) + (1 - i/N) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, any shape, float64 (Zheng
    & Yang 2024, eq. 5).

    i may lie between two integers. It is the grid of Karras et al. 2022, eq. 5, of N + 1 points in ascending order.
    """
    return karras_sigma(1 - i.to(torch.float64) / n, sigma_min, sigma_max, rho)


def lognormal_index(
    uniform: Tensor,
    n: int,
    p_mean: float,
    p_std: float,
    sigma_max: float = SIGMA_MAX,
    sigma_min: float = SIGMA_MIN,
) -> Tensor:
    """Indices i of {1, ..., N} [B] by uniform numbers [B]: P(i) is the share of ln t ~ N(p_mean, p_std^2) between T(i -
    1) and T(i) (Song & Dhariwal 2024, eq. 10)."""
    grid = karras_time(torch.arange(n + 1, device=uniform.device), n, sigma_min, sigma_max)
    shares = torch.erf((grid.log() - p_mean) / (math.sqrt(2) * p_std)).diff()
    edges = (shares.cumsum(0) / shares.sum())[:-1]
    return 1 + (uniform.to(torch.float64)[:, None] >= edges).sum(1)


# ---- from one noise level to another ---------------------------------------------------------------------------------


def jump(x: Tensor, f: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """F(x_t, t, s) = ((t - s) / t) (f - x_t) + x_t for an estimate f of the clean sample: eq. 5 of Zheng & Yang 2024,
    one Euler step of the ODE."""
    return torch.lerp(x, f, column((t - s) / t, x))


def euler_step(denoise: Denoise, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """One step of the probability-flow ODE from t to u, of first order."""
    return jump(x, denoise(x, t), t, u)


def heun_step(denoise: Denoise, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """One step from t to u > 0, of second order: Karras et al. 2022, Algorithm 1."""
    slope = (x - denoise(x, t)) / column(t, x)
    y = x + column(u - t, x) * slope
    slope_next = (y - denoise(y, u)) / column(u, x)
    return x + column(u - t, x) * (0.5 * slope + 0.5 * slope_next)


SOLVERS = {"heun": heun_step, "euler": euler_step}


def progressive_target(x: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """(t / (t - s)) (H - x_t) + x_t: the estimate f with which `jump` goes from x_t to H at s (Table 5, PD)."""
    return x + column(t / (t - s), x) * (h - x)


def column(t: Tensor, x: Tensor) -> Tensor:
    """Numbers [B], worked out in float64, for arithmetic with x [B, C, H, W]."""
    return t.to(x.dtype)[:, None, None, None]


# ---- weights -------------------------------------------------------------------------------------------------------


def weight(kind: str, t: Tensor, u: Tensor) -> Tensor:
    """Weight [B] of a sample's loss: "uniform" 1; "inverse_gap" 1 / (t - u) (Song & Dhariwal 2024, section 3.3);
    "truncated_snr" max(1 / t^2, 1) (Salimans & Ho 2022, section 4)."""
    if kind == "inverse_gap":
        return 1 / (t - u)
    return (1 / t**2).clamp(min=1) if kind == "truncated_snr" else torch.ones_like(t)


# ---- schedules over k = 0, 1, ... of K iterations --------------------------------------------------------------------


def doubling(k: int, total: int, s0: int, s1: int) -> int:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1)) (Song & Dhariwal 2024, eq.
    9). N counts points."""
    each = max(math.floor(total / (math.log2(s1 // s0) + 1)), 1)
    return min(s0 * 2 ** min(k // each, s1.bit_length()), s1) + 1


def adaptive(k: int, total: int, s0: int, s1: int) -> int:
    """N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (Song et al. 2023, appendix C). N counts points."""
    return max(math.ceil(math.sqrt(min(k / total, 1) * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1), 1) + 1


def adaptive_mu(points: int, s0: int, mu0: float) -> float:
    """mu(k) = exp(s0 ln mu0 / (N(k) - 1)), the decay of the target network that goes with it (the same appendix)."""
    return math.exp(s0 * math.log(mu0) / (points - 1))


def stage(k: int, start: int, end: int, each: int) -> tuple[int, int, int]:
    """Progressive distillation in iteration k: the student's steps n, and the stage's first iteration and length.

    n halves from `start` to `end` (start / end is a power of 2), every `each` iterations; the stages of 2 steps and of
    1 take twice as long (Salimans & Ho 2022, appendix). The last stage does not end.
    """
    n, begin = start, 0
    while True:
        length = each * (2 if n <= 2 else 1)
        if k < begin + length or n <= end:
            return n, begin, length
        n, begin = n // 2, begin + length
