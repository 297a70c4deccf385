"""A recipe file looked at without running it: everything that is wrong in it, its variants and its `mini:`."""

from __future__ import annotations

from d2o.errors import UserError
from d2o.recipes.find import find_recipe
from d2o.recipes.layers import variants_of
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe


def check_runs(name: str) -> list[Recipe]:
    """The runs that a recipe describes (itself, if it has a name, and its variants), all of them sound.

    UserError: a line for every problem, each once, with file, line and key.
    """
    found = find_recipe(name)
    asked = [found.variant] if found.variant is not None else [None, *variants_of(found)]
    lines: dict[str, None] = {}
    runs: list[Recipe] = []
    hints: list[str] = []
    for variant in asked:
        given = str(found.path) if variant is None else f"{found.path}:{variant}"
        try:
            runs.append(load_recipe(given))
        except UserError as error:
            if variant is None and len(asked) > 1 and "is trained as one of its variants" in error.message:
                continue
            lines |= dict.fromkeys(error.message.splitlines())
            hints += [error.hint] if error.hint and error.hint not in hints else []
    if lines:
        raise UserError("\n".join(lines), "\n".join(hints))
    return runs
