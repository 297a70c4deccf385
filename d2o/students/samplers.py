"""What makes images for a file: a student, or a teacher from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from d2o.condition import Condition
from d2o.data.prompts import Prompts
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.students.base import Student
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.compute import tune, tune_network


@dataclass(frozen=True)
class Sampler:
    """What makes images: `call(noise [B, C, H, W], condition)` -> [B, C, H, W] in [-1, 1]; `record` says what it is.
    `prompts`: those whose numbers stand for them as classes in what is written. `tune` has `network` run as an output
    records it."""

    call: Callable[[Tensor, Condition], Tensor]
    spec: Spec
    device: torch.device
    record: JsonObject
    prompts: Prompts | None = None
    network: nn.Module | None = None
    tune: Callable[[JsonObject], None] = lambda recorded: None

    def condition(self, labels: Tensor | None, n: int) -> Condition:
        """What n images of these classes are asked to be."""
        if labels is None:
            return Condition.none(n)
        if self.prompts is not None:
            return Condition.of_prompts(self.prompts.many(labels.tolist()))
        return Condition.of_labels(labels)


def prompted(who: str, spec: Spec, record: JsonObject, prompts: Prompts | None) -> tuple[Spec, JsonObject]:
    """Spec and record of what makes images of prompts: in what is written their numbers are the classes, image i has
    prompt i mod their number. As they are without prompts. UserError: none for `who` takes text, or the reverse."""
    if (spec.condition == "text") != (prompts is not None):
        if prompts is None:
            raise UserError(f"{who} {spec.name!r} is conditioned on text", "give --prompt or --prompts")
        instead = "; --labels chooses classes" if spec.classes else ""
        raise UserError(f"{who} {spec.name!r} takes no prompts", f"leave --prompt and --prompts away{instead}")
    if prompts is None:
        return spec, record
    about = {"sha256": prompts.sha256, "count": len(prompts)}
    return replace(spec, condition="label", classes=len(prompts)), {**record, "prompts": about}


def student_sampler(student: Student, prompts: Prompts | None = None, cfg: float | None = None) -> Sampler:
    """One call of the student. UserError: no prompts for one that takes text, or the reverse; a guidance scale for one
    that is not told it, or none for one that is; its text encoders or autoencoder are not those that it was trained
    with, or nowhere."""
    student.check_cfg(cfg)
    device = next(student.parameters()).device
    dtype: torch.dtype | None = None

    def tune(recorded: JsonObject) -> None:
        nonlocal dtype
        dtype = tune_network(student.network, recorded)

    def call(noise: Tensor, condition: Condition) -> Tensor:
        with torch.autocast(device.type, dtype) if dtype is not None else nullcontext():
            x = student(noise.to(device), condition.guided(cfg))
        return student.decode(x.to(torch.float32))

    about = student.record  # as it is called now: its steps or truncation may be others than the checkpoint's
    record = {
        "kind": "student",
        "sha256": student.fingerprint,
        "student": about,
        "nfe": student.nfe,
        "checkpoint": student.meta,
        **({} if cfg is None else {"cfg": cfg}),
    }
    spec, record = prompted("the student of", student.spec, record, prompts)
    student.fetch()
    return Sampler(call, spec, device, record, prompts, student.network, tune)


def teacher_sampler(
    teacher: Teacher, solver: Solver | None = None, cfg: float = 1.0, prompts: Prompts | None = None
) -> Sampler:
    """The teacher's whole solver (its usual one if None). UserError: a solver that does not fit, guidance of an
    unconditional teacher, no prompts for a teacher that takes text, or the reverse."""
    solver, spec = solver or teacher.solver(), teacher.spec
    solver.grid(teacher.schedule)
    if solver.stochastic:
        raise UserError(
            f"sampling to a file is deterministic; {solver.name} is not", "make pairs with it: d2o pairs --solver ..."
        )
    teacher.check_cfg(cfg)
    record = {
        "kind": "teacher",
        "name": spec.name,
        "sha256": teacher.fingerprint,
        "licence": spec.licence,
        "solver": solver.name,
        "steps": solver.steps,
        "options": solver.to_dict(),
        "cfg": cfg,
        "nfe": solver.nfe,
        "forwards": solver.forwards(cfg),
        **({} if teacher.guide is None else {"guide": teacher.guide.record}),
    }
    spec, record = prompted("teacher", spec, record, prompts)

    def call(noise: Tensor, condition: Condition) -> Tensor:
        return teacher.decode(teacher.sample(noise, condition, solver, cfg=cfg))

    return Sampler(
        call, spec, teacher.device, record, prompts, teacher.network, lambda recorded: tune(teacher, recorded)
    )
