"""The trainings that a table's rows need (`d2o train --table NAME`): each once, what others begin from first."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2o.errors import UserError
from d2o.interop.safetensors_io import read_meta
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe
from d2o.reports.paper_tables import RowRun, load_table, moved
from d2o.settings.recipe_names import shipped_names
from d2o.training.checkpoint import state_file


@dataclass(frozen=True)
class TableMember:
    """One training. `source`: its recipe as a command line names it; `overrides`: changes of it; `start`: the run that
    it begins from, `made`: which is one of this table's; `reads`: others of this table's that its recipe names, as that
    of a critic to begin with."""

    name: str
    source: str
    overrides: tuple[str, ...]
    recipe: Recipe
    folder: Path
    start: Path | None
    made: bool
    reads: frozenset[Path] = frozenset()


def table_members(table: str, overrides: Sequence[str], mini: bool, under: str) -> list[TableMember]:
    """Those of the table's rows that have a recipe, in their order, but no run before the one that it begins from.
    `under`: the folder of all runs. A beginning that no row makes is trained, too, where a shipped recipe's run is
    called so (`runs/d2g_sd_cfg3_ode`: d2g_sd_cfg3:ode), unless it is here.

    UserError: no such table; no row that can be trained; what is wrong with the recipes, a line each; runs that begin
    from one another.
    """
    paper = load_table(table)
    rows = [(row, run) for row in paper.rows for run in paper.runs_of(row, under)]
    wanted: dict[str, _Wanted] = {}
    for row, run in rows:  # several may be of one student: the first of them says how it is made
        wanted.setdefault(run.folder, _Wanted(row.name, str(row.recipe), row.changes, run))
    for row, run in rows:
        source = None if row.start is None or run.start in wanted else default_recipe(row.start)
        if run.start is not None and source is not None and not _is_here(Path(run.start)):
            wanted[run.start] = _Wanted(f"{row.name}, its beginning", source, [], RowRun(run.start, None, run.seed))
    if not wanted:
        raise UserError(f"{table}: none of its rows names a recipe", f"d2o eval --table {table} measures it")
    lines, hint, found = dict[str, None](), "", list[TableMember]()
    for folder, want in wanted.items():
        run, seed = want.run, [] if want.run.seed is None else [f"seed={want.run.seed}"]
        changes = (*want.changes, *overrides, *seed)
        try:
            recipe = load_recipe(want.source, changes, mini)
            if own := _elsewhere(recipe, under, wanted):
                changes = (*changes, *own)
                recipe = load_recipe(want.source, changes, mini)
        except UserError as error:
            lines |= {f"{want.name}: {line}": None for line in error.message.splitlines()}
            hint = hint or error.hint or ""
            continue
        start = None if run.start is None else Path(run.start)
        found.append(TableMember(Path(folder).name, want.source, changes, recipe, Path(folder), start, False))
    if lines:
        raise UserError("\n".join(lines), hint)
    return _ordered(found)


@dataclass(frozen=True)
class _Wanted:
    """A run that is needed: for which row, by which recipe, with which changes of it."""

    name: str
    source: str
    changes: Sequence[str]
    run: RowRun


def default_recipe(folder: str) -> str | None:
    """The shipped recipe, NAME or NAME:VARIANT, whose run is `folder` (runs/NAME, runs/NAME_VARIANT) unless --out says
    otherwise; None: there is none."""
    head, _, run = folder.partition("/")
    return next((name for name in shipped_names() if head == "runs" and name.replace(":", "_") == run), None)


def _is_here(folder: Path) -> bool:
    """Whether there is something to begin from as it is: a run that is finished, by whichever recipe, or no run."""
    recipe = folder / "recipe.yaml"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not recipe.is_file():
        return True
    try:
        begun, state = load_recipe(str(recipe)), read_meta(state_file(folder))
    except UserError:  # whoever continues it says what is wrong
        return False
    return bool(state.get("iteration", 0) >= -(-begun.images // begun.batch))


def _ordered(members: list[TableMember]) -> list[TableMember]:
    """Each behind the run that it begins from."""
    folders, done = {member.folder for member in members}, list[TableMember]()
    waiting = [replace(m, made=m.start in folders, reads=frozenset(_named(m.recipe) & folders)) for m in members]
    while waiting:
        ready = {member.folder for member in done}
        now = [m for m in waiting if (not m.made or m.start in ready) and m.reads <= ready]
        if not now:
            raise UserError(f"these runs begin from one another: {', '.join(member.name for member in waiting)}")
        done += now
        waiting = [member for member in waiting if member not in now]
    return done


def _elsewhere(recipe: Recipe, under: str, folders: Collection[str]) -> list[str]:
    """Changes by which the recipe names this table's runs where they are: in the folder `under` instead of `runs`."""
    texts = [(key, text, moved(text, under)) for key, text in _texts(recipe.resolved())]
    return [f"{key}={now}" for key, text, now in texts if now in folders and now != text]


def _named(recipe: Recipe) -> set[Path]:
    """Every path that the recipe may name."""
    return {Path(text) for _, text in _texts(recipe.resolved())}


def _texts(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Every text among a recipe's settings, with its key."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _texts(value, f"{above}{name}.")
        elif isinstance(value, str):
            yield f"{above}{name}", value
