"""Going on from the weights themselves of another run's student, where its checkpoints have their average."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, read_meta
from d2o.students.base import Student
from d2o.training import parts
from d2o.training.checkpoint import state_file

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe

STUDENT = "network/student/"
"""What a state's names of the student's tensors begin with."""


def wants_raw(recipe: Recipe) -> bool:
    """Whether the recipe's method is told to begin with them (`start: raw`)."""
    return getattr(recipe.options, "start", None) == "raw"


def state_beside(start: Path) -> Path:
    """The state of the run that `start`, its folder or a checkpoint in it, belongs to. UserError: there is none."""
    run = start if start.is_dir() else start.parent.parent
    path = state_file(run)
    if not path.is_file() or (not start.is_dir() and start.parent != path.parent):
        raise UserError(
            f"start: raw: {start} has no {path.name} beside it, which alone holds weights that are no average",
            "--from the folder of a run of `d2o train`, or start: ema",
        )
    return path


def check_raw(recipe: Recipe, start: Path | None) -> None:
    """UserError: the recipe asks for such weights, and there is no student to start from, or no state of its run."""
    if not wants_raw(recipe):
        return
    if start is None:
        raise UserError(
            "start: raw is of the student to start from, and there is none", "d2o finetune --from RUN, or start: ema"
        )
    if start.exists():  # else whoever loads it says so, or it is trained first
        state_beside(start)


def fill_raw(student: Student, start: Path) -> None:
    """Give the student of the run `start` the weights that it had when the run last saved its state, in the place of
    their average. UserError: `state_beside`, a damaged state, or one of another student."""
    path = state_beside(start)
    record = read_meta(path)
    if "parts" in record:
        parts.check_bytes(path.parent, record["parts"])
        tensors = parts.read_parts(
            path.parent, record["parts"], lambda _, size, dtype: torch.empty(size, dtype=dtype), STUDENT
        )
    else:
        tensors = load_file(path, prefix=STUDENT)[0]
    try:
        student.load_state_dict({name.removeprefix(STUDENT): tensor for name, tensor in tensors.items()})
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise UserError(f"start: raw: the student in {path} is another one than {start} has ({why})") from error
