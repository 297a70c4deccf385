"""The generator that another one is measured against from equal noise: its teacher, or any teacher, student or run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from d2o.errors import UserError
from d2o.evaluation.extractor import Device
from d2o.evaluation.protocol import Settings
from d2o.evaluation.subjects import Generator, Subject, open_subject
from d2o.inputs import JsonObject
from d2o.teachers.base import Spec
from d2o.teachers.registry import BUILTIN

HOW = ("sha256", "solver", "steps", "cfg", "nfe", "forwards")
SAME = ("sha256", "solver", "steps", "cfg")
"""What the samples of a noise depend on."""


def reference_teacher(
    subject: Subject,
    name: str | None,
    settings: Settings,
    device: Device = "cpu",
    needed: bool = False,
    unpaired: bool = False,
) -> tuple[Generator | None, list[str]]:
    """The teacher that a generator is measured against from equal noise, and notes on why not or how: a diffusion
    teacher as it is usually sampled, a student as it was trained (GDD, section 2.2, compares students of one and of
    several calls), or as --teacher-solver and --teacher-steps say.

    `name` is the user's choice (its errors are raised); else what the subject's metadata name, if it is here. Where
    both make the same samples there is none, unless a metric that is `needed` asks for it. `unpaired`: only sets of
    images are compared, not those of the same noise, so the teacher may be of other conditions.
    """
    if not isinstance(subject, Generator):
        return None, []
    choice = name or (
        subject.source if subject.kind == "teacher" else subject.teacher
    )  # a teacher's few steps beside its many
    if choice is None or (name is None and choice not in BUILTIN and not Path(choice).exists()):
        return None, [f"no distance to the teacher ({choice or 'not stated'}): it is not here; name it with --teacher"]
    try:
        teacher = open_subject(choice, reference_settings(settings), device)
        if not isinstance(teacher, Generator):
            raise UserError(
                f"--teacher {choice} is not a teacher (kind: {teacher.kind}), and makes nothing from a noise",
                "give a teacher, a student or a run; images and statistics are compared with by --against",
            )
        check_same_task(teacher, subject, unpaired)
        check_sampling(teacher, settings)
    except UserError as error:
        if name is not None:
            raise
        return None, [f"no distance to the teacher: {error.message}"]
    if not needed and all(subject.record.get(key) == teacher.record.get(key) for key in SAME):
        return None, []  # the same samples
    expected = subject.record.get("teacher_sha256")
    if teacher.kind == "teacher" and expected is not None and expected != teacher.record["fingerprint"]:
        return teacher, [
            f"{subject.source} was distilled from another {choice} than the one measured against (weights"
            f" {expected[:12]})"
        ]
    return teacher, []


def check_same_task(teacher: Generator, subject: Generator, unpaired: bool = False) -> None:
    """UserError unless both make samples of one shape, in one space, and but for `unpaired` sets of images, of the same
    conditions."""
    if not same_task(teacher, subject) and not (unpaired and _makes(teacher.spec) == _makes(subject.spec)):
        raise UserError(
            f"teacher {teacher.source} makes {_told(teacher.spec)}; {subject.source} makes {_told(subject.spec)}",
            "--teacher takes what makes the same of a noise; with --teacher-seed, images of other conditions, too",
        )


def check_sampling(teacher: Generator, settings: Settings) -> None:
    """UserError for --teacher-solver or --teacher-steps of a student that they do not change."""
    if teacher.kind == "teacher":
        return
    if settings.teacher_solver is not None:
        raise UserError(f"--teacher-solver: {teacher.source} is a student, which no solver samples", "leave it away")
    if settings.teacher_steps is not None and "steps" not in teacher.record:
        calls = f"{teacher.record['nfe']} call{'s' * (teacher.record['nfe'] != 1)}"
        raise UserError(f"--teacher-steps: {teacher.source} is a student of {calls}", "leave it away")


def same_task(teacher: Generator, subject: Generator) -> bool:
    """Whether one noise with one condition is an input of both."""
    a, b = teacher.spec, subject.spec
    return _makes(a) == _makes(b) and (a.condition, a.classes) == (b.condition, b.classes)


def _makes(spec: Spec) -> tuple[object, ...]:
    return spec.shape, spec.latent


def _told(spec: Spec) -> str:
    of = {"none": "without a condition", "label": f"of {spec.classes} classes", "text": "of prompts"}[spec.condition]
    return f"{list(spec.shape)} {'latents' if spec.latent else 'images'} {of}"


def reference_settings(settings: Settings) -> Settings:
    """The settings under which a generator serves as the measure of others: its usual solver and steps, or
    --teacher-solver and --teacher-steps, whatever --solver and --steps say of X."""
    return replace(settings, solver=settings.teacher_solver, steps=settings.teacher_steps)


def described(teacher: Generator) -> JsonObject:
    """What a result says of it: its source and how it made its samples."""
    return {
        "source": teacher.source,
        "kind": teacher.kind,
        **{key: teacher.record[key] for key in HOW if key in teacher.record},
    }
