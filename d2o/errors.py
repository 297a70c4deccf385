"""What can go wrong through no fault of the program: reported in one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input or the surroundings. `message` says what is wrong and where; `hint` what to do."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class MissingImages(UserError):
    """Nothing is where a set of images should be."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known word most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.55)
    return found[0] if found else None


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An unknown teacher, solver, format...: the list, and the nearest match."""
    known = sorted(known)
    near = nearest(name, known)
    hint = f"known: {', '.join(known)}"
    return UserError(f"unknown {kind} {name!r}" + (f": did you mean {near!r}?" if near else ""), hint)
