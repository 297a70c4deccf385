"""How commands are told a recipe: its name, a variant, changes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from d2o.cli import complete, console
from d2o.errors import UserError
from d2o.settings.recipe_names import parted, renamed

WHICH = (
    "A recipe file, or the name of one that ships with d2o (such as quickstart), with :VARIANT behind if it has"
    " variants. `d2o recipes` lists them."
)
RECIPE = typer.Argument(help=WHICH, show_default=False, autocompletion=complete.recipes)
RECIPE_OR_TABLE = typer.Argument(None, help=WHICH, show_default=False, autocompletion=complete.recipes)
VARIANT = typer.Option(
    [],
    "--variant",
    metavar="NAME",
    help="One of the recipe's variants: RECIPE --variant xs is RECIPE:xs.",
    show_default=False,
    autocompletion=complete.variants,
)
SET = typer.Option(
    [],
    "--set",
    metavar="KEY=VALUE",
    help="Override a recipe value, e.g. --set optim.lr=2e-4. Repeatable.",
    show_default=False,
    autocompletion=complete.keys,
)
MINI = typer.Option(
    False, "--mini", help="The recipe's small version: the same code on `digits`, about two minutes on a CPU."
)


def named(recipe: str, variants: Sequence[str]) -> str:
    """RECIPE:VARIANT, with a note where the recipe is called otherwise since the last release. UserError: two
    variants."""
    if not Path(recipe).is_file() and (new := renamed(recipe)) is not None:
        console.say(f"{recipe} is called {new} now; the old name goes with the next release")
        recipe = new
    if not variants:
        return recipe
    if len(variants) > 1:
        raise UserError(f"--variant: {', '.join(variants)}: a recipe is trained as one of its variants", "give one")
    variant = variants[0]
    if (twice := parted(recipe).variant) is not None and not Path(recipe).is_file():
        raise UserError(f"--variant {variant}: {recipe} names a variant already ({twice})", "give one of the two")
    return f"{recipe}:{variant}"
