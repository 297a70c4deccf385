"""Which settings of a run may change while it is under way: those that its past does not depend on."""

from __future__ import annotations

from collections.abc import Collection

from d2o.inputs import JsonObject
from d2o.recipes.differences import diff_recipes

FREE = ("eval", "preview", "checkpoint", "log_every", "tracker", "strategy")
"""What is measured, shown, kept and logged, and where it is computed: no weight depends on it."""
PLACES = {"images": "data.path", "pairs": "pairs.path"}
"""Where what a run is trained on lies."""


def forbidden(before: JsonObject, now: JsonObject, done: int, known: Collection[str] = ()) -> list[str]:
    """Why a run with the resolved recipe `before`, `done` images of which are trained, cannot go on as `now`: a line
    for each setting; empty when it can. More (or fewer) images are allowed where the learning rate does not depend on
    their number. `known`: "images" and "pairs" whose fingerprint the run has: they may lie elsewhere now."""
    rest = [{key: value for key, value in recipe.items() if key not in (*FREE, "images")} for recipe in (before, now)]
    moved = tuple(f"{PLACES[name]}: " for name in known)
    lines = [line for line in diff_recipes(*rest) if not line.startswith(moved)]
    if before["images"] == now["images"]:
        return lines
    line = f"images: {before['images']} -> {now['images']}"
    optimisers = {key: before.get(key) or {} for key in ("optim", "optim_critic")}
    optimisers |= {f"optim_critics.{name}": own for name, own in (before.get("optim_critics") or {}).items()}
    for section, settings in optimisers.items():
        course = settings.get("schedule", "constant")
        if course != "constant":
            why = f"the learning rate ({section}.schedule: {course}) would have been another from the start"
            return [*lines, f"{line}: {why}"]
    if now["images"] < done:
        return [*lines, f"{line}: {done:,} are trained already"]
    return lines
