"""`d2o recipes`: those that come with d2o, and help with one's own."""

from __future__ import annotations

from pathlib import Path

import typer

from d2o.cli import complete, console
from d2o.cli.numbers import Command
from d2o.cli.recipe_options import MINI, RECIPE, SET, VARIANT, named
from d2o.errors import UserError

recipes = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})


LIKE = typer.Option(
    "", "--like", metavar="TEXT", help="Only those in which this text occurs, in any column.", show_default=False
)


@recipes.callback(invoke_without_command=True)
def listed(context: typer.Context, like: str = LIKE) -> None:
    """List the recipes that come with d2o, and show, copy, check and explain them.

    For each: its method, teacher and data, what it reproduces, and whether it can run on this machine. What one needs
    and costs is told by `d2o train NAME --plan`; all of them have a small version that runs anywhere: `--mini`.
    """
    if context.invoked_subcommand is None:
        _list(like)
    elif like:
        raise UserError("--like is for the list", "d2o recipes list --like TEXT")


@recipes.command("list", cls=Command)
def list_(like: str = LIKE) -> None:
    """List the recipes that come with d2o, as `d2o recipes` alone does."""
    _list(like)


def _list(like: str) -> None:
    from rich import box
    from rich.table import Table

    from d2o.recipes.listing import entries

    heads = ("name", "method", "teacher", "data", "reproduces", "runs here")
    table = Table(*heads, box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for entry in entries(like):
        about = (entry.name, entry.method, entry.teacher, entry.data, entry.reproduces, entry.here)
        table.add_row(*map(console.escape, about))
    if not table.row_count:
        raise UserError(f"no recipe has {like!r} in it", "`d2o recipes` lists all")
    console.table(table)


@recipes.command(cls=Command)
def show(recipe: str = RECIPE, variant: list[str] = VARIANT, set_: list[str] = SET, mini: bool = MINI) -> None:
    """Print a recipe with all settings, as a run would have it: extended recipes, variants and defaults in place."""
    from d2o.recipes.load import load_recipe

    found = load_recipe(named(recipe, variant), set_, mini)
    for note in found.notes:
        console.say(note)
    console.out.print(found.to_yaml(), end="", markup=False)


@recipes.command(cls=Command)
def copy(
    recipe: str = RECIPE,
    to: str = typer.Argument(
        "", help="The file to write, or a folder for it. Default: NAME.yaml here.", show_default=False
    ),
    variant: list[str] = VARIANT,
) -> None:
    """Copy a recipe into a file of one's own, to be changed. Of a variant the keys that it comes to are written out."""
    from d2o.interop.outputs import check_output
    from d2o.interop.safetensors_io import atomic_write
    from d2o.recipes.copying import copied
    from d2o.recipes.find import find_recipe

    found = find_recipe(named(recipe, variant))
    path = Path(to)
    if not to or to.endswith("/") or path.is_dir():
        path /= "_".join(filter(None, (found.path.stem, found.variant))) + ".yaml"
    if path.exists():
        raise UserError(f"{path} is there already", "name another file behind the recipe")
    check_output(path, folder=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, copied(found))
    console.say(f"wrote {path}; d2o recipes check {path} looks at it, d2o train {path} runs it")


@recipes.command(cls=Command)
def check(recipe: str = RECIPE, variant: list[str] = VARIANT) -> None:
    """Look at a recipe without running it, variants and `mini:` too; everything that is wrong is told with its line.

    What it needs, and whether that is on this machine, is told by `d2o train FILE --plan`.
    """
    from d2o.recipes.checking import check_runs

    runs = check_runs(named(recipe, variant))
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        console.say(note)
    console.out.print(f"sound: {', '.join(run.name for run in runs)}", markup=False)


@recipes.command(cls=Command)
def explain(
    key: str = typer.Argument(
        help="A key, as sid.alpha or optim.lr; or its end, as lr.", show_default=False, autocompletion=complete.all_keys
    ),
) -> None:
    """Tell what a key of a recipe means, with its unit, default and source, and what the shipped recipes set it to."""
    from d2o.recipes.explain import explain as explained

    for found in explained(key):
        console.out.print(f"[bold]{console.escape(found.key)}[/]")
        console.out.print(f"  {found.meaning}", markup=False)
        default = "none: it has to be given" if found.default is None else found.default
        lines = {"expected": found.expected, "default": default, "declared in": found.source}
        for head, text in lines.items():
            if text:
                console.out.print(f"  {head:<12} {text}", markup=False)
        for value, names in sorted(found.used.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            console.out.print(f"  {value:<12} in {shown}", markup=False)


@recipes.command(cls=Command)
def schema(
    to: Path = typer.Argument(None, help="The file to write. Default: print it.", show_default=False),
) -> None:
    """Write a JSON schema of recipes, by which editors complete, explain and check what one types."""
    from d2o.interop.outputs import check_output
    from d2o.interop.safetensors_io import atomic_write
    from d2o.recipes.editor import schema_text

    text = schema_text()
    if to is None:
        typer.echo(text, nl=False)
        return
    if to.exists() and to.read_bytes() != text.encode():
        raise UserError(f"{to} is there already, and another file", "name another one")
    check_output(to, folder=False)
    to.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(to, text)
    console.say(
        f"wrote {to}; the first line of a recipe tells editors of it: # yaml-language-server: $schema={to.name}"
    )
