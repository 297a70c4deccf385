"""A JSON schema of recipe files, for editors: keys, their meaning and their values are offered and checked while one
types. `d2o recipes check` knows more: what is missing, and what does not go together."""

from __future__ import annotations

import json

from d2o.methods.base import get_method, method_names
from d2o.recipes.aliases import ALIASES
from d2o.recipes.schema import LOADER_KEYS, Recipe, section_key
from d2o.settings.recipe_names import VARIANT
from d2o.settings.wording import Schema, is_free, may_be_null, tree


def recipe_schema() -> Schema:
    """Draft 7, which all editors read. Nothing is required within a section, and null is allowed everywhere: a file
    may be a change of another one, as its variants are."""
    keys = _loose(tree(Recipe))["properties"]
    for name in method_names():
        options = _loose(tree(get_method(name).Options))
        keys[section_key(name)] = {**_or_null(options), "description": f"settings of method {name}"}
    for name, alias in ALIASES.items():
        keys[section_key(name)] = {"type": ["object", "null"], "description": f"as `{section_key(alias.method)}:`"}
    keys["method"] = {**keys["method"], "enum": [*method_names(), *ALIASES, None]}
    layer: Schema = {"type": "object", "properties": keys, "additionalProperties": False}
    mini: Schema = {"$ref": "#/definitions/keys", "description": LOADER_KEYS["mini"]}
    variant = {**layer, "type": ["object", "null"], "properties": {**_refer(keys), "mini": mini}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "recipe of d2o",
        "type": "object",
        "properties": {
            "extends": {"type": "string", "description": LOADER_KEYS["extends"]},
            **_refer(keys),
            "variants": {
                "type": "object",
                "description": LOADER_KEYS["variants"],
                "propertyNames": {"pattern": f"^{VARIANT}$"},
                "additionalProperties": variant,
            },
            "mini": mini,
        },
        "additionalProperties": False,
        "anyOf": [
            {"required": ["extends"]},
            {"required": ["variants", "method"]},
            {"required": ["name", "method", "optim", "batch", "images"]},
        ],
        "definitions": {"keys": layer},
    }


def schema_text() -> str:
    """As the file that ships: recipes/schema.json."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _refer(keys: Schema) -> Schema:
    return {key: {"$ref": f"#/definitions/keys/properties/{key}"} for key in keys}


def _loose(schema: Schema) -> Schema:
    """A pydantic schema without what is required, in draft 7, null allowed for every key."""

    def part(value: object) -> object:
        if isinstance(value, list):
            return [part(item) for item in value]
        return _loose(value) if isinstance(value, dict) else value

    dropped = ("required", "title", "default", "words", "$defs")
    loose: Schema = {
        key: value if key == "enum" else part(value) for key, value in schema.items() if key not in dropped
    }
    if "prefixItems" in loose:
        loose["items"], loose["additionalItems"] = loose.pop("prefixItems"), False
    if isinstance(schema.get("properties"), dict):
        loose["properties"] = {key: _or_null(_loose(value)) for key, value in schema["properties"].items()}
    return loose


def _or_null(schema: Schema) -> Schema:
    if is_free(schema) or may_be_null(schema):
        return schema
    text = {"description": schema["description"]} if "description" in schema else {}
    rest = {key: value for key, value in schema.items() if key != "description"}
    return {**text, "anyOf": [*rest.get("anyOf", [rest]), {"type": "null"}]}
