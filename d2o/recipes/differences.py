"""How two resolved recipes differ."""

from __future__ import annotations

import json
from collections.abc import Mapping


def diff_recipes(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """How two resolved recipes differ, a line per key in a's order: `optim.lr: 0.001 -> 0.002`. A key that one lacks is
    `absent` there."""
    return _diff(a, b, ())


_ABSENT = object()


def _diff(a: object, b: object, path: tuple[str, ...]) -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = list(dict.fromkeys([*a, *b]))
        return [line for key in keys for line in _diff(a.get(key, _ABSENT), b.get(key, _ABSENT), (*path, str(key)))]
    return [] if _same(a, b) else [f"{'.'.join(path)}: {_written(a)} -> {_written(b)}"]


def _same(a: object, b: object) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and (
        a == b or (a != a and b != b)
    )  # true is not 1; nan is itself


def _written(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    return (
        value if isinstance(value, str) and value and value == value.strip() else json.dumps(value, ensure_ascii=False)
    )
