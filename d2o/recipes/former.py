"""Recipes of the release before: `method: consistency` with its `kind` is the methods cd, pd and ctm now."""

from __future__ import annotations

from d2o.inputs import JsonObject
from d2o.settings.wording import KeyPath

FORMER = "consistency"
KINDS = ("cd", "pd", "ctm")
GOES = "the old name goes with the next release"
IGNORED = {"n_counts", "n_max", "schedule_images", "p_mean", "p_std", "mu", "middle", "stage_decay", "stage_target"}
"""Settings that the method passed over where they were another kind's; it refused the others."""


def is_former(data: JsonObject) -> bool:
    """Whether a recipe has the method, or its section, as they were called."""
    return data.get("method") == FORMER or (data.get("method") in KINDS and FORMER in data)


def renewed(data: JsonObject) -> JsonObject:
    """Plain data of a recipe as it is written now. Settings of other kinds are dropped at their defaults (resolved
    recipes list them all) and where they never counted; the others stay, for the schema to refuse."""
    rest = dict(data)
    if not is_former(rest):
        return rest
    sections = {kind: rest.pop(kind) for kind in KINDS if isinstance(rest.get(kind), dict)}  # of one that it extends
    old = rest.pop(FORMER, None)
    if not isinstance(old, dict | None):
        return {**rest, FORMER: old}
    given = {**{key: value for section in sections.values() for key, value in section.items()}, **(old or {})}
    kind = given.pop("kind", next(iter(sections), rest["method"] if rest["method"] in KINDS else KINDS[0]))
    if kind not in KINDS:
        return {**rest, "method": KINDS[0], KINDS[0]: {**given, "kind": kind}}
    return {**rest, "method": kind, kind: {key: value for key, value in given.items() if not _void(kind, key, value)}}


def place_as_written(data: JsonObject, path: KeyPath) -> KeyPath:
    """Where in the recipe as it was written stands what `path` names in the renewed one."""
    moved = path and path[0] in KINDS and FORMER in data and path[0] not in data
    return (FORMER, *path[1:]) if moved else path


def renewed_key(key: str, data: JsonObject) -> str:
    """What a dotted key of the former method's section is called in the renewed recipe: `consistency.loss` ->
    `cd.loss`; any other key as it is."""
    section, dot, rest = key.partition(".")
    return f"{renewed(data)['method']}.{rest}" if section == FORMER and dot and is_former(data) else key


def _void(kind: str, key: str, value: object) -> bool:
    """Whether a setting says nothing of that kind."""
    from d2o.methods.base import get_method

    fields = {name: get_method(name).Options.model_fields for name in KINDS}
    if value is None:
        return any(key in known for known in fields.values())  # null was the default of whatever could be null
    if key in fields[kind]:
        return False
    return key in IGNORED or any(key in known and known[key].default == value for known in fields.values())
