"""Other names of methods: the authors of GDD call it D2O, and D2O-F with frozen convolutions (arXiv 2506.09376)."""

from __future__ import annotations

from typing import NamedTuple

from d2o.inputs import Json, JsonObject
from d2o.settings.wording import KeyPath


class Alias(NamedTuple):
    """What a name stands for: a method, and its `student.freeze`."""

    method: str
    freeze: str | None = None


ALIASES = {"d2o": Alias("gdd"), "d2o-f": Alias("gdd", "conv"), "gdd-i": Alias("gdd", "conv")}


def method_of(name: object) -> object:
    """The method of that name, or what was given."""
    return ALIASES[name].method if isinstance(name, str) and name in ALIASES else name


def own_name(data: JsonObject) -> JsonObject:
    """Plain data of a recipe with the method's own name and section. What the recipe itself says of `student.freeze`
    stays."""
    alias = ALIASES.get(str(data.get("method")))
    if alias is None:
        return data
    written = _section(data)
    rest = {key: value for key, value in data.items() if key != written}
    if written in data:
        rest[alias.method] = _merged(data.get(alias.method), data[written])
    student = rest.get("student", {})
    if alias.freeze is not None and isinstance(student, dict):
        rest["student"] = {"freeze": alias.freeze, **student}
    return {**rest, "method": alias.method}


def place_of(data: JsonObject, path: KeyPath) -> KeyPath:
    """Where in the recipe as it was written stands what `path` names under the method's own name."""
    alias = ALIASES.get(str(data.get("method")))
    moved = alias is not None and path[:1] == (alias.method,) and _section(data) in data
    return (_section(data), *path[1:]) if moved else path


def _merged(below: Json, above: Json) -> Json:
    """A section over that of a recipe which is extended."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _section(data: JsonObject) -> str:
    return str(data["method"]).replace("-", "_")
