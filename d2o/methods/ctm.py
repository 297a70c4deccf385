"""The trajectory loss of consistency trajectory models (Kim et al. 2024), as in Table 5 of Zheng & Yang 2024. The
network is told where on the ODE to go. Neither the denoising loss nor the GAN of the whole method."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.condition import Embedded
from d2o.losses.consistency import column
from d2o.methods.base import Draws, Loop
from d2o.methods.grid import GridMethod, GridOptions
from d2o.networks.config import Config
from d2o.networks.second_time import second_time_config, with_second_time
from d2o.students.base import Student
from d2o.students.consistency import ConsistencyStudent


class CTMOptions(GridOptions):
    i_min: Literal[1, 2] = Field(
        2, description="lowest index of t on the grid (Table 5: 2, so that the solver stops one step above sigma_min)"
    )
    max_hops: int | None = Field(None, ge=1, description="most solver steps from t to u (null: down to sigma_min)")
    hops: Literal["from_1", "from_0"] = Field(
        "from_1", description="fewest solver steps from t to u: one, or none (Table 5 has u <= t)"
    )


class CTM(GridMethod[CTMOptions]):
    name = "ctm"
    Options = CTMOptions
    form = "ctm"

    def copied(self, network: nn.Module, start: Student | None = None) -> nn.Module:
        told = isinstance(start, ConsistencyStudent) and start.form == "ctm"  # it takes s already
        return super().copied(network) if told else with_second_time(network)

    def scratch(self, config: Config) -> nn.Module:
        return super().scratch(second_time_config(config))

    def loss(self, loop: Loop, x: Tensor, embedded: Embedded, draw: Draws, n: int) -> Tensor:
        """d(F(x_t, t, s), H), both taken on to sigma_min by the target network; H goes by the solver to u, and from
        there by the target network to s (Table 5, CTM)."""
        o, i, z = self.options, self.index(draw, n), draw.randn(*x.shape[1:])
        longest = min(o.max_hops or n, n)
        most = (i - (min(o.i_min, n) - 1)).clamp(max=longest)  # with 1 <= j, where 2 <= i
        hops = below(most, draw) + 1 if o.hops == "from_1" else below(most + 1, draw)
        j = i - hops
        k = below(j + 1, draw)
        t, u, s, end = self.T(i, n), self.T(j, n), self.T(k, n), self.T(0 * i, n)
        x_t = x + column(t, x) * z
        with torch.no_grad():
            x_u = x_t
            for hop in range(longest):
                at = (i - hop).clamp(min=1)
                x_next = self.solve(x_u, self.T(at, n), self.T(at - 1, n), embedded)
                x_u = torch.where((hop < hops)[:, None, None, None], x_next, x_u)
            with self.target(loop) as target, self.replayed():
                goal = self.hop(target, self.hop(target, x_u, u, s, embedded), s, end, embedded)
        x_s = self.hop(loop.net("student"), x_t, t, s, embedded)
        with self.target(loop) as target:
            y = self.hop(target, x_s, s, end, embedded)
        return self.weighted(t, u) * self.distance(y, goal)


def below(n: Tensor, draw: Draws) -> Tensor:
    """Uniform integers of {0, ..., n - 1}, for each sample its own n [B]."""
    return (draw.rand().to(torch.float64) * n).floor().to(torch.int64)


METHOD = CTM
