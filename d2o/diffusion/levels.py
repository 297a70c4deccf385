"""Noise levels sigma = sigma_t / alpha_t of a schedule, and back: which time, and which alpha, a level has."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError
from d2o.inputs import JsonObject


class Levels(Protocol):
    """`sigma_min`, `sigma_max`: the range that the network knows. `alpha(sigma)` any shape; `time(sigma)` float32, as
    the network counts it; `nearest(sigma)`: the nearest level that the network was trained on."""

    sigma_min: float
    sigma_max: float

    def alpha(self, sigma: Tensor) -> Tensor: ...
    def time(self, sigma: Tensor) -> Tensor: ...
    def nearest(self, sigma: Tensor) -> Tensor: ...


class DiscreteLevels:
    """alpha^2 + sigma_t^2 = 1 on times 0 .. T - 1; between them log sigma is linear."""

    def __init__(self, alphas_cumprod: Tensor):
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        if len(self.sigmas) < 2 or not bool((self.sigmas.diff() > 0).all()) or not bool(self.sigmas.isfinite().all()):
            raise UserError("schedule: its noise levels do not rise from time to time", "d2o needs two and more")
        self.sigma_min, self.sigma_max = float(self.sigmas[0]), float(self.sigmas[-1])

    def alpha(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2).rsqrt()

    def time(self, sigma: Tensor) -> Tensor:
        grid, at = self.sigmas.log().to(sigma.device), sigma.to(torch.float64).log()
        above = (grid[:-1] <= at[..., None]).sum(-1).clamp(1, len(grid) - 1)
        low, high = grid[above - 1], grid[above]
        return (above - 1 + ((at - low) / (high - low)).clamp(0, 1)).to(torch.float32)

    def nearest(self, sigma: Tensor) -> Tensor:
        return self.sigmas.to(sigma.device)[self.time(sigma).round().long()].to(sigma.dtype)


class FlowLevels:
    """x_t = (1 - t) x_0 + t eps: sigma = t / (1 - t). The network counts to `train_steps`."""

    def __init__(self, train_steps: int = 1000):
        self.train_steps = train_steps
        self.sigma_min, self.sigma_max = 1 / (train_steps - 1), float(train_steps - 1)

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def time(self, sigma: Tensor) -> Tensor:
        return (self.train_steps * sigma / (1 + sigma)).to(torch.float32)

    def nearest(self, sigma: Tensor) -> Tensor:
        return sigma


def levels_of(record: JsonObject) -> Levels:
    """Of a `schedule` as configurations hold it: {kind: flow, train_steps}, or a diffusers scheduler's keys of its
    betas. UserError: no schedule."""
    if record.get("kind") == "flow":
        return FlowLevels(int(record.get("train_steps", 1000)))
    with torch.device("cpu"):  # it is no part of the network, which may be built without memory
        return DiscreteLevels(DiscreteSchedule.from_config(dict(record)).alphas_cumprod)
