"""Whether the students that a table's rows name are those that its numbers are of: by the recipe that they record,
which may be its small version (--mini), and by the size of their images."""

from __future__ import annotations

from d2o.errors import UserError
from d2o.evaluation.preset_check import sides_of
from d2o.evaluation.presets import Preset
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import read_meta, resolve_checkpoint
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe
from d2o.reports.paper_tables import PaperRow


def not_of(row: PaperRow, folder: str, preset: Preset | None) -> str | None:
    """Why the student in `folder` must not be measured as this row: its recipe's small version of other data, or images
    of another size than the protocol's. None: nothing is known against it."""
    meta = _recorded(folder)
    made, meant, small = _made(meta), _recipe(row, False), _recipe(row, True)
    if made is not None and meant is not None and (other := other_data(made, meant, small)):
        return (
            f"{folder} is the small version (--mini) of {row.recipe}, {other}: the table's numbers are not of it;"
            f" d2o eval {folder} measures it as what it is"
        )
    spec = meta.get("spec") or {}
    sides = sides_of(preset) if preset is not None else set()
    if sides and spec.get("space") == "pixel" and spec["shape"][-1] not in sides:
        size = f"{spec['shape'][-1]}x{spec['shape'][-1]}"
        assert preset is not None
        return (
            f"{folder} makes images of {size}; the protocol {preset.name} is of {preset.data}"
            f" ({' or '.join(f'{side}x{side}' for side in sorted(sides))}); d2o eval {folder} measures it as what it is"
        )
    return None


def remark(row: PaperRow, folder: str) -> str | None:
    """What to say of a student that is measured, though its training was of another length than its recipe's."""
    made, meant = _made(_recorded(folder)), _recipe(row, False)
    if made is None or meant is None or made.images == meant.images:
        return None
    return f"{row.name}: trained on {made.images:,} images; its recipe has {meant.images:,}"


def other_data(made: Recipe, meant: Recipe, small: Recipe | None) -> str | None:
    """In words, of what else than `meant` the recipe `made` is because its `mini:` says so; None: of the same. A copy
    of the teacher or the images under another name is no other data."""
    for what, of in (("teacher", lambda r: r.teacher), ("images", lambda r: r.data and r.data.path)):
        if small is not None and of(made) != of(meant) and of(made) == of(small):
            return f"of {what} {of(made) or 'none'} in place of {of(meant) or 'none'}"
    return None


def _recorded(folder: str) -> JsonObject:
    """Of the checkpoint; {} where it cannot be read, which the evaluation says."""
    try:
        return read_meta(resolve_checkpoint(folder))
    except UserError:
        return {}


def _made(meta: JsonObject) -> Recipe | None:
    try:
        return Recipe.from_dict(meta["recipe"]) if meta.get("recipe") else None
    except UserError:  # of a release that d2o no longer reads
        return None


def _recipe(row: PaperRow, mini: bool) -> Recipe | None:
    """That of the row; None where it has none, or no small version."""
    try:
        return None if row.recipe is None else load_recipe(row.recipe, row.changes, mini)
    except UserError:
        return None
