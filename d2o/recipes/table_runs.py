"""The trainings that a table's rows need (`d2o train --table NAME`): each once, what others begin from first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d2o.errors import UserError
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe
from d2o.reports.paper_tables import load_table


@dataclass(frozen=True)
class TableMember:
    """One training. `source`: its recipe as a command line names it; `overrides`: changes of it; `start`: the run that
    it begins from, `made`: which is one of this table's."""

    name: str
    source: str
    overrides: tuple[str, ...]
    recipe: Recipe
    folder: Path
    start: Path | None
    made: bool


def table_members(table: str, overrides: Sequence[str], mini: bool, under: str) -> list[TableMember]:
    """Those of the table's rows that have a recipe, in their order, but no run before the one that it begins from.
    `under`: the folder of all runs.

    UserError: no such table; no row that can be trained; what is wrong with the recipes, a line each; runs that begin
    from one another.
    """
    paper, lines, hint = load_table(table), dict[str, None](), ""
    found: dict[str, TableMember] = {}
    for row in paper.rows:
        for run in paper.runs_of(row, under):
            if run.folder in found:  # several rows are of one student
                continue
            changes = (*row.changes, *overrides, *([] if run.seed is None else [f"seed={run.seed}"]))
            assert row.recipe is not None
            try:
                recipe = load_recipe(row.recipe, changes, mini)
            except UserError as error:
                lines |= {f"{row.name}: {line}": None for line in error.message.splitlines()}
                hint = hint or error.hint or ""
                continue
            start = None if run.start is None else Path(run.start)
            found[run.folder] = TableMember(
                Path(run.folder).name, row.recipe, changes, recipe, Path(run.folder), start, False
            )
    if lines:
        raise UserError("\n".join(lines), hint)
    if not found:
        raise UserError(f"{table}: none of its rows names a recipe", f"d2o eval --table {table} measures it")
    return _ordered(list(found.values()))


def _ordered(members: list[TableMember]) -> list[TableMember]:
    """Each behind the run that it begins from."""
    folders, done, waiting = {member.folder for member in members}, list[TableMember](), list(members)
    while waiting:
        ready = {member.folder for member in done}
        now = [member for member in waiting if member.start not in folders or member.start in ready]
        if not now:
            raise UserError(f"these runs begin from one another: {', '.join(member.name for member in waiting)}")
        done += [TableMember(**{**vars(member), "made": member.start in folders}) for member in now]
        waiting = [member for member in waiting if member not in now]
    return done
