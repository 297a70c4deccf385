"""Deterministic solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, eq. 1 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from d2o.errors import unknown

Denoise = Callable[[Tensor, Tensor], Tensor]


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """First order. x [B, ...] at sigmas[0]; `denoise(x float32, sigma [B] float32)`; the state is float64. Returns x at sigmas[-1], float64."""
    x = x.to(torch.float64)
    for t, t_next in pairwise(sigmas):
        x = x + (t_next - t) * _slope(denoise, x, t)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second order, Euler on the last step to 0. Arguments as `euler`."""
    x = x.to(torch.float64)
    for t, t_next in pairwise(sigmas):
        d = _slope(denoise, x, t)
        x_next = x + (t_next - t) * d
        if t_next > 0:
            x_next = x + (t_next - t) * (0.5 * d + 0.5 * _slope(denoise, x_next, t_next))
        x = x_next
    return x


def _slope(denoise: Denoise, x: Tensor, t: Tensor) -> Tensor:
    d = denoise(x.to(torch.float32), t.to(torch.float32).to(x.device).expand(len(x)))
    return (x - d.to(torch.float64)) / t


SOLVERS: dict[str, Callable[[Denoise, Tensor, Tensor], Tensor]] = {"heun": heun, "euler": euler}


def get_solver(name: str) -> Callable[[Denoise, Tensor, Tensor], Tensor]:
    """The solver of that name. UserError names the known ones."""
    if name not in SOLVERS:
        raise unknown("solver", name, SOLVERS)
    return SOLVERS[name]


def nfe(solver: str, steps: int) -> int:
    """Network evaluations per sample as the papers count them: Heun 2 steps - 1, Euler steps."""
    get_solver(solver)
    return 2 * steps - 1 if solver == "heun" else steps
