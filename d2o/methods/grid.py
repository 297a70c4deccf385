"""The grid of noise levels and the target network of consistency models (methods cd and ctm): Song et al. 2023, Song &
Dhariwal 2024."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d2o.losses import consistency as c
from d2o.methods.base import Batch, Draws, Loop, Setup
from d2o.methods.jumps import JumpMethod, JumpOptions
from d2o.networks.copying import local
from d2o.students.consistency import MIDDLE


class GridOptions(JumpOptions):
    n_counts: Literal["points", "steps"] = Field(
        "points", description="what N counts: the points of the grid (Song et al. 2023), or its steps (Table 5)"
    )
    n_schedule: Literal["constant", "doubling", "adaptive"] = Field(
        "constant",
        description=(
            "N in the course of training: constant; doubled from N to n_max (iCT); by CT's square root (both count"
            " points)"
        ),
    )
    n_max: int | None = Field(None, ge=2, description="s1 of the schedule, the largest N less 1; its s0 is N")
    schedule_images: int | None = Field(None, ge=1, description="images over which the schedule of N runs")
    i_min: Literal[1, 2] = Field(1, description="lowest index of t on the grid")
    i_sampling: Literal["uniform", "lognormal"] = Field(
        "uniform", description="distribution of that index: uniform, or after ln t ~ N (iCT)"
    )
    p_mean: float = Field(-1.1, description="mean of ln t for lognormal")
    p_std: float = Field(2.0, gt=0, description="standard deviation of ln t for lognormal")
    target: Literal["stopgrad", "ema"] = Field(
        "stopgrad", description="network of the target: the student itself, or a moving average of it"
    )
    mu: float = Field(
        0.95, ge=0, lt=1, description="decay of that average, an iteration; with n_schedule adaptive its mu_0"
    )
    middle: float = Field(
        MIDDLE,
        gt=0,
        lt=1,
        description="place of the second call's noise level on Karras' scale, 0 the lowest, 1 the highest",
    )

    @model_validator(mode="after")
    def _grid(self) -> GridOptions:
        if self.N < 2 and self.n_counts == "points":
            raise ValueError("N: a grid has at least 2 points (n_counts: steps counts its steps instead)")
        if self.n_schedule != "constant" and (self.n_max is None or self.schedule_images is None):
            raise ValueError(f"n_schedule: {self.n_schedule} needs n_max and schedule_images")
        if self.n_max is not None and self.n_max < self.N:
            raise ValueError(f"n_max: {self.n_max} is below N = {self.N}, with which the schedule begins")
        return self


G = TypeVar("G", bound=GridOptions)


class GridMethod(JumpMethod[G]):
    """N noise levels, of which an index is drawn for each image, and a target network that follows the student."""

    def __init__(self, setup: Setup[G]):
        super().__init__(setup)
        average = self.options.target == "ema"
        self.average = copy.deepcopy(self.student).requires_grad_(False) if average else None

    def states(self) -> dict[str, nn.Module]:
        return {} if self.average is None else {"target": self.average}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        n = self.steps(iteration)
        loss = self.descend(loop, batch, n)
        self.follow(iteration)
        return {"loss": loss, **self.course(n)}

    def steps(self, iteration: int) -> int:
        """The number of steps of this iteration's grid."""
        o = self.options
        if o.n_schedule == "constant":
            return o.N - 1 if o.n_counts == "points" else o.N
        return self.points(iteration) - 1

    def points(self, iteration: int) -> int:
        """N(k) of the schedule."""
        o = self.options
        assert o.schedule_images is not None and o.n_max is not None
        course = {"doubling": c.doubling, "adaptive": c.adaptive}[o.n_schedule]
        return course(iteration, -(-o.schedule_images // self.batch), o.N, o.n_max)

    def course(self, n: int) -> dict[str, Tensor]:
        """N for the log, where it changes."""
        constant = self.options.n_schedule == "constant"
        return {} if constant else {"N": torch.tensor(float(n), device=self.device)}

    def index(self, draw: Draws, n: int) -> Tensor:
        """i of t = T(i, n), from i_min to n."""
        o, lowest = self.options, min(self.options.i_min, n)
        if o.i_sampling == "lognormal":
            return c.lognormal_index(draw.rand(), n, o.p_mean, o.p_std, self.sigma, self.lowest).clamp(min=lowest)
        return draw.randint(lowest, n + 1)

    def target(self, loop: Loop) -> AbstractContextManager[nn.Module]:
        """The network of targets, its parameters held fixed."""
        return loop.frozen("student") if self.average is None else nullcontext(self.average)

    @torch.no_grad()
    def follow(self, iteration: int) -> None:
        """theta^- <- mu theta^- + (1 - mu) theta."""
        if self.average is None:
            return
        mu = self.options.mu
        if self.options.n_schedule == "adaptive":
            mu = c.adaptive_mu(self.points(iteration), self.options.N, mu) if mu else 0.0
        mine, theirs = ([local(p.detach()) for p in net.parameters()] for net in (self.average, self.student))
        torch._foreach_lerp_(mine, theirs, 1 - mu)
