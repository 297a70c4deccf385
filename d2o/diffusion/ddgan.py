"""The forward process of denoising diffusion GANs: a VP process cut into K large steps, and the Gaussian posterior of
one step.

Xiao, Kreis & Vahdat 2022 ("Tackling the generative learning trilemma with denoising diffusion GANs"), section 3 and
appendix; the noise levels are those of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 1e-3
"""Time of the first point of the grid; the last is 1."""
BETA_0 = 1e-8
"""Variance that is added even to the data."""
LOG_VARIANCE_MIN = -46.051701859880914
"""ln 1e-20: the smallest log variance of the posterior."""


class DDGANProcess:
    """x_t = A_t x_0 + S_t n for t = 0 .. K; t = 0 is the data but for 1e-4 of noise, t = K is noise but for 0.7 % of
    the data.

    On the grid s_i = 1e-3 + (1 - 1e-3) i / K, log mean coefficient -s^2 (20 - 0.1) / 4 - 0.1 s / 2. `A`, `S`, `a`, `b`
    are float64 tables [K + 1]: a step i multiplies by a_i = sqrt(1 - b_i) and adds variance b_i; A_i is the product of
    a_0 .. a_i. Networks are told the step t of 0 .. K - 1, which leads from x_{t+1} to x_t. Methods take t [B] int64
    and images [B, ...] and compute in the images' type.
    """

    def __init__(self, steps: int):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.steps = steps
        s = FIRST + (1 - FIRST) * torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        log_mean = -0.25 * s**2 * (20.0 - 0.1) - 0.5 * s * 0.1
        self.b = torch.cat([s.new_tensor([BETA_0]), -torch.expm1(2 * log_mean.diff())])
        self.a = (1 - self.b).sqrt()
        self.A = self.a.cumprod(0)
        self.S = (1 - self.A**2).sqrt()
        # Of the posterior q(x_t | x_{t+1}, x_0); the bars are products from the first step on, without a_0, so that
        # step 0 ends at x_0 itself.
        bar = torch.exp(2 * (log_mean - log_mean[0]))
        rest = -torch.expm1(2 * (log_mean - log_mean[0]))
        beta = self.b[1:]
        self.from_x0 = beta * bar[:-1].sqrt() / rest[1:]
        self.from_next = rest[:-1] * (1 - beta).sqrt() / rest[1:]
        self.deviation = (0.5 * (beta * rest[:-1] / rest[1:]).log().clamp(min=LOG_VARIANCE_MIN)).exp()
        self.deviation[0] = 0  # the last step is not noisy
        self.devices: dict[torch.device, dict[str, Tensor]] = {}

    def pair(self, x0: Tensor, t: Tensor, n1: Tensor, n2: Tensor) -> tuple[Tensor, Tensor]:
        """A real pair (x_t, x_{t+1}) from standard normal noises: x_t ~ q(x_t | x_0), x_{t+1} ~ q(x_{t+1} | x_t)."""
        x_t = self.at("A", t, x0) * x0 + self.at("S", t, x0) * n1
        return x_t, self.at("a", t + 1, x0) * x_t + self.at("root_b", t + 1, x0) * n2

    def posterior(self, x0: Tensor, x_next: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_{t+1}, x_0), reparameterised (differentiable in x_0); at t = 0 it is x_0, and the noise is
        not used."""
        return (
            self.at("from_x0", t, x0) * x0 + self.at("from_next", t, x0) * x_next + self.at("deviation", t, x0) * noise
        )

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t of a table, on the device, in the type and for the shape of `like`."""
        tables = self.devices.get(like.device)
        if tables is None:  # moved once: a copy in every step would wait for the device
            mine = {
                "A": self.A,
                "S": self.S,
                "a": self.a,
                "root_b": self.b.sqrt(),
                "from_x0": self.from_x0,
                "from_next": self.from_next,
                "deviation": self.deviation,
            }
            tables = self.devices[like.device] = {key: table.to(like.device) for key, table in mine.items()}
        return tables[name][t].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
