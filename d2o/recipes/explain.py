"""What a key of a recipe means, and where that comes from."""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from d2o.errors import UserError, nearest
from d2o.inputs import JsonObject
from d2o.methods.base import get_method, method_names
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.layers import read_recipe
from d2o.recipes.schema import LOADER_KEYS, Recipe, describe, section_key
from d2o.settings.yaml_text import Problems, plain

DEFAULT = re.compile(r"\s*\(default:? (.*)\)$", re.DOTALL)


@dataclass(frozen=True)
class Explanation:
    """`default` None: it has to be given. `source`: the file that declares it. `used`: value -> shipped recipes."""

    key: str
    meaning: str
    expected: str
    default: str | None
    source: str
    used: Mapping[str, tuple[str, ...]]


def explain(key: str) -> list[Explanation]:
    """The key of that dotted name; or all whose name ends in it (`lr`: `optim.lr` and `optim_critic.lr`), short names
    first.

    UserError: there is none, with the nearest one.
    """
    rows = {row.key: row for method in (None, *method_names()) for row in describe(method)}
    found = (
        [key]
        if key in rows
        else sorted((name for name in rows if name.endswith(f".{key}")), key=lambda name: name.count("."))
    )
    if not found:
        near = nearest(key, rows) or nearest(key, {name.rpartition(".")[2] for name in rows})
        advice = f": did you mean {near!r}?" if near else ""
        raise UserError(f"unknown key {key!r}{advice}", "`d2o recipes show NAME` shows all of a recipe's")
    values = _values()
    return [_explanation(name, rows[name].expected, rows[name].description, values) for name in found]


def explanations() -> dict[str, list[Explanation]]:
    """Every key of recipes, in order: "" -> those of all, a method -> those of its own section. The documentation's
    tables are made of them."""
    values = _values()
    found = {"": [_explanation(*row, values) for row in describe()]}
    for method in method_names():
        own = f"{section_key(method)}."
        found[method] = [_explanation(*row, values) for row in describe(method) if row.key.startswith(own)]
    return found


def _explanation(key: str, expected: str, text: str, values: list[tuple[str, JsonObject]]) -> Explanation:
    default = DEFAULT.search(text)
    used: dict[str, tuple[str, ...]] = {}
    for name, keys in values:
        there, value = _at(keys, key)
        if there and not isinstance(value, dict):
            used[str(value)] = (*used.get(str(value), ()), name)
    field = owner(key)
    says = default[1] if default else _default(*field) if field else "none"
    source = "d2o/recipes/schema.py" if field is None else _file(field[0])
    return Explanation(key, DEFAULT.sub("", text), expected, says, source, used)


def _default(model: type[BaseModel], name: str) -> str | None:
    """Of a key whose description leaves it out."""
    if not name:
        return "as its keys say"
    field = model.model_fields[name]
    if field.is_required():
        return None
    value = to_jsonable_python(field.get_default(call_default_factory=True), inf_nan_mode="constants")
    return "as its keys say" if isinstance(value, dict) else "none" if value is None else json.dumps(value)


def owner(key: str) -> tuple[type[BaseModel], str] | None:
    """The model that declares a key, and its field there ("" for a method's whole section); None for what only the
    loader knows (`extends`)."""
    first, *rest = key.split(".")
    sections = {section_key(name): get_method(name).Options for name in method_names()}
    if first in LOADER_KEYS:
        return None
    if first in sections and first not in Recipe.model_fields:
        return _owner(sections[first], rest) if rest else (sections[first], "")
    return _owner(Recipe, [first, *rest])


def _owner(model: type[BaseModel], path: list[str]) -> tuple[type[BaseModel], str] | None:
    found = model.model_fields.get(path[0])
    if found is None:
        return None
    if len(path) == 1:
        return next(base for base in model.__mro__ if path[0] in inspect.get_annotations(base)), path[0]
    inner = (_owner(below, path[1:]) for below in _models(found.annotation))
    return next((place for place in inner if place is not None), None)


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """The models in a type: of `OptimSection | None`, OptimSection."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def _file(model: type[BaseModel]) -> str:
    file = Path(inspect.getfile(model))
    package = Path(__file__).parents[2]
    return str(file.relative_to(package)) if file.is_relative_to(package) else str(file)


def _values() -> list[tuple[str, JsonObject]]:
    """What the shipped recipes write, without --mini."""
    return [(name, plain(read_recipe(find_recipe(name), Problems()))) for name in recipe_names()]


def _at(keys: object, key: str) -> tuple[bool, object]:
    for part in key.split("."):
        if not isinstance(keys, dict) or part not in keys:
            return False, None
        keys = keys[part]
    return True, keys
