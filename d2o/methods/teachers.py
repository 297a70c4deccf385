"""Which teachers a method can learn from."""

from __future__ import annotations

from pathlib import Path

from d2o.errors import UserError
from d2o.methods.base import get_method, method_names
from d2o.teachers.base import Teacher
from d2o.teachers.kinds import Kind, kind_of
from d2o.teachers.registry import teacher_names

DISTILS = {
    "edm": "denoisers of the EDM family",
    "edm pixel": "EDM's pixel networks in EDM's own preconditioning",
}
"""What `Method.takes` may say, in words."""


def takes(method: str, kind: Kind) -> bool:
    """Whether the method can learn from teachers of that kind; what is not known of it yet does not count against
    it."""
    wanted = get_method(method).takes
    if kind.family != "edm" or not wanted:
        return False
    return wanted == "edm" or (kind.arch != "edm2" and kind.precond in (None, "edm", "consistency"))


def methods_for(kind: Kind) -> list[str]:
    """The methods that learn from teachers of that kind."""
    return [name for name in method_names() if takes(name, kind)]


def check_kind(method: str, kind: Kind) -> None:
    """UserError: the method does not learn from teachers of that kind; with what can be done."""
    if takes(method, kind):
        return
    wanted = get_method(method).takes
    if not wanted:
        what = f"method {method} learns without a teacher, and the recipe has `teacher: {kind.name}`"
        raise UserError(
            what,
            "take `teacher` out, or a method that distils:"
            f" {', '.join(name for name in method_names() if get_method(name).takes)}",
        )
    if ways := methods_for(kind):
        first = f"methods that take this teacher: {', '.join(ways)}"
    else:
        commands = f"d2o sample --teacher {kind.name}, d2o pairs --teacher {kind.name}"
        measured = (
            f", d2o eval {kind.name}" if kind.name in teacher_names() or Path(kind.name).exists() else ""
        )  # not from the hub itself
        first = f"no method trains on such a teacher yet; what it can do: {commands}{measured}"
    rest = "any of NVIDIA's .pkl, and what `d2o train` makes with method edm"
    names = "digits, edm-..., edm2-..." if wanted == "edm" else "digits, edm-..."
    hint = f"{first}\nteachers that method {method} takes: {names} (d2o teachers lists them), {rest}"
    raise UserError(f"method {method} distils {DISTILS[wanted]}; teacher {kind.name!r} {kind.words()}", hint)


def check_teacher(method: str, teacher: Teacher | None) -> Teacher:
    """The teacher if the method can learn from it. UserError otherwise."""
    if teacher is None:
        raise UserError(f"method {method} needs a `teacher:`", "d2o teachers lists some")
    check_kind(method, kind_of(teacher))
    return teacher
