"""Students of a few calls along the teacher's probability-flow ODE, without fresh noise (Zheng & Yang 2024, GDD,
section 3: their few-step generators): x_0 = D(x_t; t), then x_u = x_0 + (u / t) (x_t - x_0), and again; the last call's
x_0 is the sample, or where the ODE goes by it at the lowest level. A sample stays a function of its noise and
condition."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from d2o.condition import Embedded
from d2o.diffusion.guidance import Range
from d2o.diffusion.levels import DiscreteLevels
from d2o.diffusion.schedules import karras_sigma
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.losses.consistency import RHO
from d2o.networks.edm_view import EDMView, called_at, lowest_level
from d2o.networks.scale_input import scale_embedding
from d2o.students.base import Student
from d2o.teachers.base import Spec


class FewStepStudent(Student):
    """A student as `Student`, called at sigma and then at the levels `then`, which fall. `last`: the level to which the
    last call leads, below them; 0: its x_0. UserError: they do not fall, or are none that the network knows."""

    def __init__(
        self,
        network: nn.Module,
        spec: Spec,
        sigma: float,
        then: Sequence[float],
        begins: str = "noise",
        guidance: Range | None = None,
        last: float = 0.0,
    ):
        super().__init__(network, spec, sigma, begins, guidance)
        self.last = last
        self.levels = (self.sigma, *(called_at(network, float(level)) for level in then))
        low = lowest_level(network)
        if not then or any(a <= b for a, b in pairwise(self.levels)) or self.levels[-1] < max(low, 1.001 * last):
            wanted = f"levels below {self.sigma:g} that fall, none below {low:.3g}"
            raise UserError(f"student.levels: {list(then)}: expected {wanted}")
        self.nfe = len(self.levels)

    @property
    def record(self) -> JsonObject:
        record = {**super().record, "kind": "few_step", "then": list(self.levels[1:])}
        return record | ({"last": self.last} if self.last else {})

    @classmethod
    def from_record(cls, network: nn.Module, spec: Spec, record: JsonObject) -> FewStepStudent:
        plain = Student.from_record(network, spec, record)
        last = record.get("last", 0.0)
        return cls(network, spec, plain.sigma, record["then"], plain.begins, plain.guidance, last)

    def call(self, noise: Tensor, embedded: Embedded, scale: Tensor | None = None) -> Tensor:
        told = () if scale is None else (scale_embedding(scale),)
        x = noise.to(torch.float32) * self.factor
        for t, u in pairwise((*self.levels, self.last)):
            d = self.network(x, noise.new_full((1,), t, dtype=torch.float32), embedded, *told)
            x = d if u == 0 else d + (u / t) * (x - d)
        return x


def spaced_levels(network: nn.Module, sigma: float, steps: int) -> list[float]:
    """The levels after sigma at which a student of that many steps is called. Of a discrete schedule those of the times
    that diffusers' "trailing" spacing takes (999, 499; 999, 749, 499, 249), so that its schedulers make the same steps;
    else evenly on Karras' scale, down to and without the lowest (Zheng & Yang 2024)."""
    sigma = called_at(network, sigma)
    if isinstance(network, EDMView) and isinstance(levels := network.levels, DiscreteLevels):
        with torch.device("cpu"):  # levels are no part of the network, which a plan builds without memory
            count = int(levels.time(torch.tensor(sigma, dtype=torch.float64)).round()) + 1
            times = (count - torch.arange(1, steps, dtype=torch.float64) * count / steps).round().long() - 1
            return levels.sigmas[times].tolist()
    return [float(karras_sigma(i / steps, lowest_level(network), sigma, RHO)) for i in range(1, steps)]


STUDENT = FewStepStudent
