"""Any teacher as one of the EDM family: what methods that distil work on."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from d2o.condition import Condition, Embedded
from d2o.diffusion.schedules import EDMSchedule
from d2o.inputs import JsonObject
from d2o.networks.edm_view import EDMView
from d2o.spaces.base import LatentSpace
from d2o.teachers.base import Teacher


class ViewTeacher(Teacher):
    """The teacher in x = x_0 + sigma n: its `network` is the teacher's `edm_view()`, which shares the teacher's
    weights, and its `spec` has the range of noise levels of that. Conditions, prompts and decoding are the teacher's.

    `sample` runs over the EDM family's own steps; pairs are made by the teacher itself.
    """

    def __init__(self, teacher: Teacher):
        view = teacher.edm_view()
        assert isinstance(view, EDMView)
        spec = replace(teacher.spec, sigma_min=view.sigma_min, sigma_max=view.sigma_max, solver="heun", steps=18)
        super().__init__(view, spec, teacher.device, teacher.dtype)
        self.teacher, self.meta = teacher, teacher.meta
        self.schedule = EDMSchedule(view.sigma_min, view.sigma_max)

    def unconditional(self, embedded: Embedded) -> Embedded:
        return self.teacher.unconditional(embedded)

    def check_condition(self, embedded: Embedded, batch: int) -> Embedded:
        return self.teacher.check_condition(embedded, batch)

    def embed(self, condition: Condition | Embedded) -> Embedded:
        return self.teacher.embed(condition)

    def expect_prompts(self, repeated: bool) -> None:
        self.teacher.expect_prompts(repeated)

    def decode(self, x: Tensor) -> Tensor:
        return self.teacher.decode(x)

    @property
    def space(self) -> LatentSpace:
        return self.teacher.space

    @property
    def record(self) -> JsonObject:
        return self.teacher.record

    @property
    def fingerprint(self) -> str:
        return self.teacher.fingerprint


def in_edm(teacher: Teacher) -> Teacher:
    """The teacher itself if it is of the EDM family, else a `ViewTeacher` of it."""
    if isinstance(teacher, ViewTeacher) or teacher.edm_view() is teacher.network:
        return teacher
    return ViewTeacher(teacher)
