"""What a recipe leaves open of its pairs, read from the store that it names: a store says itself how it was made."""

from __future__ import annotations

from d2o.data.pairs_section import PairsSection
from d2o.inputs import JsonObject


def fill_from_store(data: JsonObject, begun: JsonObject | None = None) -> JsonObject:
    """A recipe's plain data, with what its `pairs:` do not say taken from the store at `pairs.path`, if there is one;
    the teacher too.

    `begun`: the resolved recipe of the run that is continued, which is believed instead: the store may have grown
    since. UserError: the store's manifest is damaged.
    """
    pairs = data.get("pairs")
    if not isinstance(pairs, dict) or not isinstance(path := pairs.get("path"), str) or not path:
        return data
    before = (begun or {}).get("pairs") or {}
    if before.get("path") == path:
        assert begun is not None
        found, teacher = before, begun.get("teacher")
    else:
        found, teacher = _said_by(path)
    known = {key: value for key, value in found.items() if key in PairsSection.model_fields}
    filled = {**data, "pairs": {**known, **pairs}}
    return {**filled, "teacher": teacher} if filled.get("teacher") is None and teacher is not None else filled


def _said_by(path: str) -> tuple[JsonObject, str | None]:
    """The settings that a store was made with, and its teacher; nothing where there is no store."""
    from d2o.data.pair_files import open_store, store_folder

    if store_folder(path).manifest() is None:
        return {}, None
    _, _, settings = open_store(
        path
    )  # not how it was computed: a run's recipe is the same whether its store was there before or not
    return settings.to_dict(), settings.teacher
