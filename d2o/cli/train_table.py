"""`d2o train --table NAME`: the runs of a paper's table, one after another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from d2o.cli import console
from d2o.cli.hints import fit
from d2o.cli.opening import open_device
from d2o.cli.plan import verdict
from d2o.cli.train_run import begin_run, check_options, check_run, finish_run, opened
from d2o.errors import UserError
from d2o.runtime import Stopped, stop_flag, worker

if TYPE_CHECKING:
    from d2o.recipes.plan import Plan
    from d2o.recipes.table_runs import TableMember
    from d2o.teachers.base import Teacher


def train_table(
    table: str, overrides: list[str], under: Path | None, mini: bool, plan: bool, device_name: str | None
) -> None:
    """Train all runs of the table that are not finished, once all are checked, and say first what they take.

    UserError: what none of them could start with; runs that failed (the others are trained all the same). Stopped: the
    same command continues.
    """
    from d2o.recipes.table_runs import table_members
    from d2o.training.distributed import barrier, process_group

    runs = under or Path("runs/mini" if mini else "runs")
    members = table_members(table, overrides, mini, str(runs))
    plans = _plans(members)
    if worker()[0] == 0:
        _show(table, members, plans)
    if plan:
        return verdict(plans)
    problems = {
        member.name: "\n".join(map(fit, (*plan.missing, *plan.refused)))
        for member, plan in zip(members, plans, strict=True)
        if not plan.starts
    }
    if len(problems) == len(members):
        raise UserError("\n".join(f"{name}: {why}" for name, why in problems.items()))
    failed: dict[str, str] = dict(problems)
    device = open_device(device_name)
    with stop_flag() as stop, process_group(device) as (rank, world):
        for i, member in enumerate(members):
            where = f"{member.name} ({i + 1} of {len(members)})"
            if member.name in problems:
                console.say(f"{where} is left out: {problems[member.name]}")
                continue
            needed = [folder for folder in (member.start, *member.reads) if folder is not None]
            if lost := [folder for folder in needed if folder.name in failed]:
                failed[member.name] = f"{lost[0]} failed"
                continue
            try:
                with opened(member.folder, member.recipe, True, member.start, device, rank, world) as unfinished:
                    if not unfinished:
                        console.say(f"{where} is finished")
                        continue
                    console.say(f"--- {where}")
                    arguments = (member.recipe, member.folder, device, rank, world, member.start, stop)
                    trainer = begin_run(member.source, list(member.overrides), *arguments)
                    finish_run(trainer, stop)
                    del trainer  # before the next one takes as much memory
            except UserError as error:
                # The other processes may not have met it; a disk that is full is so for the next run, too.
                if world > 1 or isinstance(error.__cause__, OSError):
                    raise
                failed[member.name] = error.message
                console.error(f"{where}: {error.message}", error.hint)
            except Stopped as stopped:
                raise Stopped(
                    f"{where}: {stopped.message}", stopped.exit_code - 128, "the same command continues"
                ) from stopped
            barrier(world)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(members)} runs are not trained: {', '.join(failed)}",
            "the lines above say why; the same command tries them again",
        )
    console.say(
        f"{'all' if len(members) > 1 else 'the'} {_runs(members)} finished; {_measure(table, members, runs, mini)}"
    )


def _runs(members: list[TableMember]) -> str:
    return f"{len(members)} run{'s are' if len(members) != 1 else ' is'}"


def _measure(table: str, members: list[TableMember], runs: Path, mini: bool) -> str:
    """What measures them. Small versions of other data are not what the table's protocol is of."""
    from d2o.recipes.load import load_recipe
    from d2o.recipes.row_students import other_data

    if mini:
        for member in members:
            if other := other_data(member.recipe, load_recipe(member.source, member.overrides), member.recipe):
                return (
                    f"these are small versions ({member.name} is {other}), of which the paper's table says nothing:"
                    f" d2o eval {member.folder} measures one, d2o train --table {table} trains the paper's"
                )
    return f"d2o eval --table {table}" + ("" if runs == Path("runs") else f" --runs {runs}")


def _plans(members: list[TableMember]) -> list[Plan]:
    """A plan for each, as --plan makes it; a run of this table that is still to come is not missed."""
    from d2o.recipes.plan import make_plan

    teachers: dict[str, Teacher] = {}
    made = {member.folder: member.recipe for member in members}
    plans = []
    for member in members:
        start = member.start if member.start is None or member.start.exists() or not member.made else None
        before = None if member.start is None else made.get(member.start)
        plan = make_plan(member.recipe, start, teachers, before=before)
        to_come = [str(folder) for folder in member.reads if not folder.exists()]
        plan.refused = [line for line in plan.refused if not any(folder in line for folder in to_come)]
        checks = (
            lambda member=member: check_options(member.recipe, None, member.start),
            lambda member=member: check_run(member.folder, member.recipe, True, member.start),
        )
        for check in checks:
            try:
                check()
            except UserError as error:
                plan.refused.append(str(error))
        plans.append(plan)
    return plans


def _show(table: str, members: list[TableMember], plans: list[Plan]) -> None:
    """A line for each run, and what all together take. Pairs that several need are made once, by the first."""
    shown = Table(
        title=f"{table}: {len(members)} run{'s' * (len(members) != 1)}", title_justify="left", box=box.SIMPLE_HEAD
    )
    for head in ("run", "recipe", "begins from"):
        shown.add_column(head)
    for head in ("images", "parameters", "memory", "network calls", "disk"):
        shown.add_column(head, justify="right", no_wrap=True)
    from d2o.recipes.plan import MAKING_PAIRS
    from d2o.recipes.stages import AS_PAPERS, BOTH_STAGES, WITH_PAIRS

    places = set[str]()
    calls = disk = 0
    for member, plan in zip(members, plans, strict=True):
        known = {place for place in plan.disk if place in places}
        more_calls = plan.network_calls - (plan.calls.get(MAKING_PAIRS, 0) if known else 0)
        more_disk = sum(n for place, n in plan.disk.items() if place not in known)
        places |= {place for place in plan.disk if place.startswith("pairs")}
        calls, disk = calls + more_calls, disk + more_disk
        shown.add_row(
            escape(member.name),
            escape(member.source),
            "" if member.start is None else escape(member.start.name),
            f"{member.recipe.images:,}",
            f"{sum(plan.networks.values()):,}",
            console.size(sum(plan.memory.values())),
            f"{more_calls:,}",
            console.size(more_disk),
        )
    console.table(shown)
    for member, plan in zip(members, plans, strict=True):
        for line in (*plan.missing, *plan.refused):
            console.out.print(f"{member.name}: {fit(line)}", markup=False)
    for member, plan in zip(members, plans, strict=True):
        counted = [
            f"{plan.calls[key]:,} {what}"
            for key, what in (
                (AS_PAPERS, "alone"),
                (BOTH_STAGES, "with the stage before"),
                (WITH_PAIRS, "with the pairs"),
            )
            if key in plan.calls
        ]
        if counted:
            console.out.print(f"{member.name}: training, as papers count (NFE): {', '.join(counted)}", markup=False)
    console.out.print(f"together: {calls:,} network calls, {console.size(disk)} of disk")
