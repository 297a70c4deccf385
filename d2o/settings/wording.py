"""What is wrong with settings, in words: "expected an integer >= 1, got 'abc'" for pydantic's errors; the nearest key
for an unknown one.

It sees models through their JSON schemas, so that it fits any method's options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from d2o.errors import nearest
from d2o.inputs import JsonObject

KeyPath = tuple[str | int, ...]
"""Where in the settings: ("optim", "betas", 0)."""

Schema = JsonObject
"""A JSON schema without references; {} allows anything."""

NUMBERS = {"integer", "number"}


class Problem(NamedTuple):
    """One thing wrong. `path` may end in a key that is missing."""

    path: KeyPath
    text: str


def dotted(path: Sequence[str | int]) -> str:
    """("optim", "betas", 0) -> optim.betas[0]"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def show(value: object) -> str:
    """A value as a recipe writes it, short."""
    if isinstance(value, Mapping):
        return "a section" if value else "an empty section"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1] if isinstance(value, str) else ''}"


# ---- what may be there -----------------------------------------------------------------------------------------------


class Shape:
    """What settings may hold: a tree of JSON schemas. `more`: top-level keys that are valid in files but not part of
    the tree."""

    def __init__(self, tree: Schema, more: Sequence[str] = ()):
        self.tree, self.more = tree, list(more)

    def at(self, path: KeyPath) -> Schema | None:
        """The schema of a key; {} inside a free section; None for an unknown key."""
        schema: Schema | None = self.tree
        for part in path:
            schema = child(schema, part)
        return schema

    def keys(self, path: KeyPath) -> list[str]:
        """The keys that a section may have."""
        keys = [key for member in members(self.at(path) or {}) for key in member.get("properties", {})]
        return keys + (self.more if not path else [])

    def paths(self, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        """All keys of the tree, a section before what is in it."""
        found = []
        for key in (key for member in members(self.at(path) or {}) for key in member.get("properties", {})):
            found += [(*path, key), *self.paths((*path, key))]
        return found


def tree(model: type[BaseModel]) -> Schema:
    """The JSON schema of a model, references filled in."""
    schema = model.model_json_schema()
    return _inline(schema, schema.get("$defs", {}), ())


def _inline(schema: Schema, definitions: Schema, inside: tuple[str, ...]) -> Schema:
    if isinstance(schema.get("$ref"), str):
        name = schema["$ref"].removeprefix("#/$defs/")
        if name in inside:  # a model that holds itself: anything goes from here on
            return {}
        return {
            **_inline(definitions[name], definitions, (*inside, name)),
            **{key: value for key, value in schema.items() if key != "$ref"},
        }

    def part(value: object) -> object:
        if isinstance(value, list):
            return [part(item) for item in value]
        return _inline(value, definitions, inside) if isinstance(value, dict) else value

    return {key: part(value) for key, value in schema.items() if key != "$defs"}


def members(schema: Schema) -> list[Schema]:
    """The members of a union (several deep), or the schema itself."""
    union = schema.get("anyOf") or schema.get("oneOf") or (schema["allOf"] if len(schema.get("allOf", [])) == 1 else [])
    return [member for part in union for member in members(part)] if union else [schema]


def child(schema: Schema | None, part: str | int) -> Schema | None:
    """The schema of a key or list item below `schema`; {} where anything may be, None where nothing may."""
    for member in members(schema) if schema is not None else []:
        if is_free(member):
            return {}
        if isinstance(part, int):
            items = member.get("prefixItems", [])
            found = items[part] if part < len(items) else member.get("items")
        else:
            found = member.get("properties", {}).get(part, member.get("additionalProperties"))
        if found is True:
            return {}
        if isinstance(found, dict):
            return found
    return None


def is_free(schema: Schema) -> bool:
    """Anything may be here."""
    return not schema.keys() & {"type", "anyOf", "oneOf", "allOf", "enum", "const"}


def may_be_null(schema: Schema) -> bool:
    return any(is_free(member) or member.get("type") == "null" for member in members(schema))


def is_section(schema: Schema) -> bool:
    return any(member.get("type") == "object" for member in members(schema))


def phrase(schema: Schema) -> str:
    """What a schema asks for, null aside: `an integer >= 1`, `'adam', 'adamw' or 'sgd'`. Empty where it asks for
    nothing."""
    if "words" in schema:
        return str(schema["words"])
    words = [_phrase(member) for member in members(schema) if member.get("type") != "null"]
    return " or ".join(dict.fromkeys(word for word in words if word))


def _phrase(schema: Schema) -> str:
    choices, kind = [show(choice) for choice in _choices(schema)], schema.get("type")
    if choices:
        return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
    if kind in NUMBERS:
        signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
        bounds = " and ".join(f"{sign} {json.dumps(schema[limit])}" for limit, sign in signs.items() if limit in schema)
        return f"{'an integer' if kind == 'integer' else 'a number'} {bounds}".strip()
    if kind == "string":
        return (
            f"a text like {schema['pattern']}"
            if "pattern" in schema
            else "a text, not empty"
            if schema.get("minLength")
            else "a text"
        )
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        items = [phrase(item) for item in schema.get("prefixItems", [])]
        if items:
            return f"a list of {len(items)}, " + (
                f"each {items[0]}" if len(set(items)) == 1 else f"[{', '.join(items)}]"
            )
        return f"a list, each {phrase(schema['items'])}" if schema.get("items") else "a list"
    return "a section (lines of `key: value`)" if kind == "object" else ""


def _choices(schema: Schema) -> list[object]:
    return list(schema["enum"]) if "enum" in schema else [schema["const"]] if "const" in schema else []


# ---- what is wrong ---------------------------------------------------------------------------------------------------

_EXPECTED = ("_type", "_error", "_short", "_long", "_mismatch", "_than", "_equal", "_number", "_float", "_of", "enum")
"""Ends of the names of pydantic's errors that "expected ..., got ..." says better than its own message."""


def word(error: ValidationError, data: object, prefix: KeyPath, shape: Shape) -> list[Problem]:
    """The problems of `data`, which stands at `prefix` in the settings."""
    return list(dict.fromkeys(_word(details, data, prefix, shape) for details in error.errors(include_url=False)))


def _word(details: ErrorDetails, data: object, prefix: KeyPath, shape: Shape) -> Problem:
    kind, location = details["type"], details["loc"]
    if (
        kind == "missing" and location and isinstance(location[-1], int)
    ):  # a tuple that is too short: speak of the tuple
        kind, location = "too_short", location[:-1]
    path, value = _inside(location, data, prefix, shape)
    path = (*prefix, *path)
    if kind == "extra_forbidden":
        return Problem(path, _unknown_key(path, shape))
    if kind in ("value_error", "assertion_error"):
        return Problem(path, str(details.get("ctx", {}).get("error", details["msg"])))
    schema = shape.at(path)
    expected = "" if schema is None else phrase(schema)
    if kind == "missing":
        return Problem(path, f"missing; expected {expected}" if expected else "missing")
    if schema is None or not expected or not kind.endswith(_EXPECTED):
        return Problem(path, f"{details['msg']}, got {show(value)}")
    got = show(value)
    if isinstance(value, (list, tuple)) and any(member.get("type") == "array" for member in members(schema)):
        got = f"{len(value)} value{'' if len(value) == 1 else 's'}"  # a list, but of another length
    return Problem(path, f"expected {expected}, got {got}{_advice(schema, value)}")


def _inside(location: Sequence[str | int], data: object, prefix: KeyPath, shape: Shape) -> tuple[KeyPath, object]:
    """Pydantic's location without the parts that name a member of a union, and the value there (None where a key is
    missing)."""
    path: list[str | int] = []
    for i, part in enumerate(location):
        if (isinstance(data, Mapping) and part in data) or (
            isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)
        ):
            data = data[part]  # type: ignore[index]
        elif isinstance(data, Mapping) and i == len(location) - 1 and shape.at((*prefix, *path, part)) is not None:
            data = None
        else:
            continue
        path.append(part)
    return tuple(path), data


def _unknown_key(path: KeyPath, shape: Shape) -> str:
    key, known = str(path[-1]), shape.keys(path[:-1])
    nested = key.split(".")
    if len(nested) > 1 and shape.at((*path[:-1], *nested)) is not None:
        return f"unknown key; write it as {': {'.join(nested)}: ...{'}' * (len(nested) - 1)}"
    elsewhere = [dotted(found) for found in shape.paths() if found[-1] == key]
    near = nearest(key, known)
    if elsewhere and (len(elsewhere) == 1 or not near):
        near = elsewhere[0]
    return f"unknown key; did you mean {near!r}?" if near else f"unknown key; known here: {', '.join(known)}"


def _advice(schema: Schema, value: object) -> str:
    """What most likely was meant."""
    types = {member.get("type") for member in members(schema)}
    choices = [str(choice) for member in members(schema) for choice in _choices(member)]
    if isinstance(value, float) and "integer" in types and abs(value) < 1e15 and value == round(value):
        return f" (write {int(value)})"
    if isinstance(value, str) and types & NUMBERS and _is_number(value):
        return " (leave out the quotes)"
    if isinstance(value, str) and "boolean" in types and value.lower() in ("yes", "on", "no", "off"):
        return f" (write {'true' if value.lower() in ('yes', 'on') else 'false'})"
    if isinstance(value, (bool, int, float)) and "string" in types and not choices:
        return " (put it in quotes)"
    near = nearest(value, choices) if isinstance(value, str) and choices else None
    return f"; did you mean {near!r}?" if near else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
