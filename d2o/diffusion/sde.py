"""Forward processes in continuous time, t in [0, 1]: the VP, VE and sub-VP SDEs dx = f(t) x dt + g(t) dw with their
marginals in closed form.

Song et al. 2021 ("Score-based generative modeling through SDEs"), section 3.4 and appendix B: x_t = alpha_t x_0 +
sigma_t eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from d2o.errors import unknown


class ForwardSDE(Protocol):
    """`alpha`, `sigma`: mean coefficient and standard deviation of x_t given x_0; `drift` f and `diffusion` g, all of t
    [B] (or any shape)."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def drift(self, t: Tensor) -> Tensor: ...

    def diffusion(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class VP:
    """Variance preserving: beta(t) = beta_min + t (beta_max - beta_min), f = -beta / 2, g = sqrt(beta); alpha^2 +
    sigma^2 = 1 (eq. 11, 29)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t: Tensor) -> Tensor:
        """Integral of beta from 0 to t."""
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))


@dataclass(frozen=True)
class SubVP(VP):
    """sub-VP: the same mean as VP, with less noise: sigma = 1 - exp(-integral) and g = sqrt(beta (1 - exp(-2
    integral))) (eq. 12, 29)."""

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integral(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t) * -torch.expm1(-2 * self.integral(t)))


@dataclass(frozen=True)
class VE:
    """Variance exploding: f = 0, g = s(t) sqrt(2 ln(sigma_max / sigma_min)) with s(t) = sigma_min (sigma_max /
    sigma_min)^t (eq. 9, 29, 30).

    sigma_t = sqrt(s(t)^2 - sigma_min^2), so that x_0 is the data itself.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def level(self, t: Tensor) -> Tensor:
        """s(t)."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.sqrt(torch.expm1(2 * math.log(self.sigma_max / self.sigma_min) * t))

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.level(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))


PROCESSES: dict[str, type[VP | VE | SubVP]] = {"vp": VP, "ve": VE, "subvp": SubVP}


def get_process(name: str, **options: float) -> ForwardSDE:
    """The process of that name. UserError: an unknown name or option, with the known ones."""
    if name not in PROCESSES:
        raise unknown("forward process", name, PROCESSES)
    known = [field.name for field in fields(PROCESSES[name])]
    for option in options:
        if option not in known:
            raise unknown(f"option of the forward process {name}", option, known)
    return PROCESSES[name](**options)


def perturb(process: ForwardSDE, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t eps in one go: x and noise [B, ...], t [B]."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return process.alpha(t) * x + process.sigma(t) * noise
