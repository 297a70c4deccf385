"""d2o: diffusion to one step. `import d2o` is light; torch is imported when something needs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from d2o.version import __version__

if TYPE_CHECKING:
    from d2o.data.pairs import PairStore as PairStore
    from d2o.metrics.frechet import frechet_distance as frechet_distance
    from d2o.students.base import load_student as load_student
    from d2o.teachers.registry import load_teacher as load_teacher

_LAZY = {
    "load_teacher": "d2o.teachers.registry",
    "load_student": "d2o.students.base",
    "PairStore": "d2o.data.pairs",
    "frechet_distance": "d2o.metrics.frechet",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'd2o' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
