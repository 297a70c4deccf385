"""Which teachers a method can learn from."""

from __future__ import annotations

from pathlib import Path

from d2o.errors import UserError
from d2o.methods.base import get_method, method_names
from d2o.networks.edm_view import EDMView
from d2o.networks.precond import Denoiser
from d2o.teachers.base import Teacher
from d2o.teachers.in_edm import in_edm
from d2o.teachers.kinds import FAMILIES, TeacherKind, kind_of
from d2o.teachers.registry import teacher_names

PRECONDITIONING = "it gives the network a preconditioning of its own, in exchange for EDM's and for no other"
NORMALISED = "its steps do not keep the weights of EDM2 normalised"

REFUSES: dict[str, dict[str, str]] = {
    "edm": {},
    "edm pixel": {"edm-other": PRECONDITIONING, "edm2": NORMALISED},
}
"""What `Method.takes` may say -> the families that such a method cannot learn from, and why."""


def why_not(method: str, kind: TeacherKind) -> str:
    """Why the method cannot learn from teachers of that kind; "" if it can, or if nothing is known against it."""
    wanted = get_method(method).takes
    if not wanted:
        return "it learns without a teacher"
    return REFUSES[wanted].get(kind.family, "")


def takes(method: str, kind: TeacherKind) -> bool:
    """Whether the method can learn from teachers of that kind; what is not known of it yet does not count against
    it."""
    return not why_not(method, kind)


def methods_for(kind: TeacherKind) -> list[str]:
    """The methods that learn from teachers of that kind."""
    return [name for name in method_names() if takes(name, kind)]


def check_kind(method: str, kind: TeacherKind) -> None:
    """UserError: the method does not learn from teachers of that kind; with what can be done."""
    why = why_not(method, kind)
    if not why:
        return
    if not get_method(method).takes:
        what = f"method {method} learns without a teacher, and the recipe has `teacher: {kind.name}`"
        distilling = ", ".join(name for name in method_names() if get_method(name).takes)
        raise UserError(what, f"take `teacher` out, or a method that distils: {distilling}")
    if ways := methods_for(kind):
        first = f"methods that take this teacher: {', '.join(ways)}"
    else:
        commands = f"d2o sample --teacher {kind.name}, d2o pairs --teacher {kind.name}"
        known = kind.name in teacher_names() or Path(kind.name).exists()
        measured = f", d2o eval {kind.name}" if known else ""  # not from the hub itself
        first = f"no method trains on such a teacher; what it can do: {commands}{measured}"
    taken = [FAMILIES[family] for family in FAMILIES if family not in REFUSES[get_method(method).takes]]
    hint = "\n  ".join([f"{first}\nteachers that method {method} takes:", *taken])
    raise UserError(f"teacher {kind.name!r} {kind.words()}, which method {method} cannot learn from: {why}", hint)


def check_teacher(method: str, teacher: Teacher | None) -> Teacher:
    """The teacher as one of the EDM family (`in_edm`), if the method can learn from it. UserError otherwise."""
    if teacher is None:
        raise UserError(f"method {method} needs a `teacher:`", "d2o teachers lists some")
    check_kind(method, kind_of(teacher))
    found = in_edm(teacher)
    if not isinstance(found.network, (Denoiser, EDMView)):
        kind = type(found.network).__name__
        what = f"method {method} cannot learn from teacher {teacher.spec.name!r}: its network is a {kind}, no denoiser"
        raise UserError(what, "d2o teachers lists some")
    return found
