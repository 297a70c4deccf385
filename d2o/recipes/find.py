"""From what people call a recipe to its file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from d2o.errors import UserError, nearest
from d2o.recipes.aliases import method_of
from d2o.settings.recipe_names import parted, renamed, shipped_file, shipped_names, stem


class Found(NamedTuple):
    """A recipe's file, and which of its variants was asked for."""

    path: Path
    variant: str | None


def recipe_names() -> list[str]:
    """Names of the recipes that come with d2o, each before its variants (`sid_edm2_512:xs`)."""
    return list(shipped_names())


def find_recipe(name: str | os.PathLike[str]) -> Found:
    """The file of a recipe: a path as it is given; else one that comes with d2o, with or without `recipes/` and
    `.yaml`. `:VARIANT` behind either asks for a variant. Names of the release before lead to those of today.

    UserError: a folder; no such recipe, with the nearest one and the list.
    """
    given = os.fspath(name)
    if os.path.exists(given) and not os.path.isdir(given):
        return Found(Path(given), None)
    recipe, variant = parted(given)
    if variant is not None and os.path.isfile(recipe):
        return Found(Path(recipe), variant)
    new = parted(renamed(given) or given)
    if (path := shipped_file(new.recipe)) is not None:
        return Found(path, new.variant)
    if given and os.path.isdir(given):
        inside = os.path.join(given, "recipe.yaml")
        raise UserError(
            f"{given} is a folder; expected a recipe (.yaml)",
            f"did you mean {inside}?" if os.path.isfile(inside) else "",
        )
    short = stem(recipe)
    if short and "/" not in short and (recipe == short or recipe.startswith("recipes/")):
        wrong = f"{short}:{variant}" if variant else short
        if (method := _method(short)) is not None:
            raise UserError(f"{wrong!r} is a method, not a recipe", f"`d2o recipes --like {method}` lists its recipes")
        near = nearest(wrong, recipe_names())
        advice = f": did you mean {near!r}?" if near else ""
        raise UserError(f"unknown recipe {wrong!r}{advice}", f"known: {_known()}")
    near = nearest(Path(short).name, recipe_names())
    advice = f"; did you mean recipe {near!r}?" if near else ""
    raise UserError(f"no such recipe file: {given!r}{advice}", f"known recipes: {_known()}")


def _method(name: str) -> str | None:
    """The method that is called so, by its own name or another."""
    from d2o.methods.base import method_names  # brings torch, which only a mistake waits for

    method = str(method_of(name.replace("_", "-")))
    return method if method in method_names() else None


def _known() -> str:
    """The shipped recipes in a text, without their variants."""
    names = recipe_names()
    stems = list(dict.fromkeys(parted(name).recipe for name in names))
    return ", ".join(stems) + ("" if stems == names else "; `d2o recipes` lists their variants too")
