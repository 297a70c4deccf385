"""How a student begins that trains adapters (LoRA) of its teacher's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from d2o.errors import UserError
from d2o.networks.copying import replaced
from d2o.networks.edm_view import EDMView
from d2o.networks.lora import add_lora, lora_of
from d2o.teachers.base import Teacher

if TYPE_CHECKING:
    from d2o.methods.base import Setup
    from d2o.students.student_section import LoraSection

ALL = "student.lora: null trains all weights"


def begin_lora(asked: LoraSection, teacher: Teacher | None, setup: Setup[Any]) -> EDMView:
    """The teacher's network with adapters: those of `setup.start` go on, else new ones. Its other weights are the
    teacher's own tensors. UserError: a network that is not diffusers', random weights, or a student to start from that
    is another one's."""
    if teacher is None or not isinstance(teacher.network, EDMView):
        who = "without a teacher" if teacher is None else f"teacher {teacher.spec.name!r} is none"
        raise UserError(f"student.lora: adapters are for networks of teachers in diffusers' format, and {who}", ALL)
    if setup.student.init != "teacher":
        raise UserError("student.lora: adapters of random weights, which no checkpoint names", "student.init: teacher")
    alpha = asked.rank if asked.alpha is None else asked.alpha
    lora = {"rank": asked.rank, "alpha": alpha, "targets": list(asked.targets)}
    network = cast(EDMView, replaced(teacher.network, {p: p for p in teacher.network.parameters()}))
    if setup.start is not None:
        check_adapters(setup.start.network, lora, teacher)
    add_lora(network, {**lora, "base": teacher.record})
    if setup.start is not None:
        network.load_state_dict(setup.start.network.state_dict())
    return network


def check_adapters(start: nn.Module, lora: dict[str, Any], teacher: Teacher) -> None:
    """UserError: the student to start from has no adapters, other ones, or those of another teacher."""
    theirs = lora_of(start)
    if theirs is None:
        raise UserError(
            "student.lora: all weights of the student to start from are its own; adapters change a teacher", ALL
        )
    for key, value in lora.items():
        if theirs[key] != value:
            raise UserError(
                f"student.lora.{key} is {value}, that of the student to start from {theirs[key]}",
                f"student.lora.{key}: {theirs[key]}; or null, which merges its adapters and trains all weights",
            )
    theirs, ours = theirs["base"], teacher.record
    if None not in (theirs["sha256"], ours["sha256"]) and theirs["sha256"] != ours["sha256"]:
        raise UserError(
            f"the student to start from is a LoRA of {theirs['name']}, and the recipe's teacher is {ours['name']},"
            " whose weights are others",
            f"teacher: {theirs['name']}",
        )
