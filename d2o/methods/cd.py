"""Consistency distillation (Song et al. 2023, Algorithm 2), in their form or that of Table 5 of Zheng & Yang 2024.

Zheng & Yang's CD-I is this with `student.freeze: conv`. What papers and code do differently are options; their defaults
are those of Song et al.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d2o.condition import Embedded
from d2o.losses.consistency import column
from d2o.methods.base import Draws, Loop
from d2o.methods.grid import GridMethod, GridOptions
from d2o.students.consistency import estimate


class CDOptions(GridOptions):
    i_min: Literal[1, 2] = Field(1, description="lowest index of t on the grid (Table 5: 1; the authors' code: 2)")
    solver: Literal["heun", "euler", "none"] = Field(  # type: ignore[assignment]
        "heun", description="teacher's solver; none: x + u z instead of the teacher, which is consistency training"
    )
    form: Literal["f", "F"] = Field(
        "f", description="what is compared: f(x_t, t) (Song et al. 2023), or F(x_t, t, sigma_min) (Table 5)"
    )
    last_hop: Literal["student", "solver"] = Field(
        "student",
        description=(
            "the way from one step above sigma_min, in the target: the student's, or the solver's (Zheng & Yang's code)"
        ),
    )

    @model_validator(mode="after")
    def _hop(self) -> CDOptions:
        if self.solver == "none" and self.last_hop == "solver":
            raise ValueError("last_hop: solver needs a solver, and there is none")
        return self


class CD(GridMethod[CDOptions]):
    name = "cd"
    Options = CDOptions
    form = "cd"
    precond = "consistency"  # f(x, sigma_min) = x is built in

    def loss(self, loop: Loop, x: Tensor, embedded: Embedded, draw: Draws, n: int) -> Tensor:
        """d(f(x_t, t), sg f(x_u, u)) with u one step below t, x_u one solver step from x_t (Song et al. 2023, eq.
        7)."""
        i, z = self.index(draw, n), draw.randn(*x.shape[1:])
        t, u, end = self.T(i, n), self.T(i - 1, n), self.T(0 * i, n)
        x_t = x + column(t, x) * z
        with torch.no_grad():
            x_u = self.solve(x_t, t, u, embedded) if self.options.solver != "none" else x + column(u, x) * z
            with self.target(loop) as target, self.replayed():
                goal = self.to_end(target, x_u, u, end, embedded)
            if self.options.last_hop == "solver":
                goal = torch.where((i == 2)[:, None, None, None], self.solve(x_u, u, end, embedded), goal)
        y = self.to_end(loop.net("student"), x_t, t, end, embedded)
        return self.weighted(t, u) * self.distance(y, goal)

    def to_end(self, network: nn.Module, x: Tensor, t: Tensor, end: Tensor, embedded: Embedded) -> Tensor:
        """f(x_t, t), or F(x_t, t, sigma_min)."""
        if self.options.form == "F":
            return self.hop(network, x, t, end, embedded)
        return estimate(network, self.form, x, t, end, embedded)


METHOD = CD
