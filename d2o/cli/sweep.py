"""`d2o train RECIPE --sweep KEY=A,B,...`: the runs of a sweep one after another, and what they say together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from d2o.cli import console
from d2o.cli.hints import fit
from d2o.cli.opening import open_device
from d2o.cli.plan import show_plan, verdict
from d2o.cli.train_run import begin_run, check_options, check_run, finish_run, opened
from d2o.errors import UserError
from d2o.interop.temporary import sweep as clear
from d2o.runtime import Stopped, stop_flag

if TYPE_CHECKING:
    from d2o.inputs import JsonObject
    from d2o.recipes.plan import Plan
    from d2o.recipes.sweep import Member, Sweep
    from d2o.teachers.base import Teacher


def run_sweep(
    name: str,
    overrides: list[str],
    sweeps: list[str],
    out: Path | None,
    data: str | None,
    mini: bool,
    plan: bool,
    device_name: str | None,
    start: Path | None,
) -> None:
    """Train all members that are not finished; the sweep's folder then holds a run folder for each, sweep.json,
    sweep.svg and, of runs with previews, sweep.png.

    Everything is checked, and planned as --plan does it, before the first one starts. UserError: a value that cannot be
    trained, or a member that failed (the others are trained all the same). Stopped: the same command continues.
    """
    from d2o.interop.outputs import check_output
    from d2o.recipes.sweep import check_folder, plan_sweep
    from d2o.recipes.sweep_record import check_same, update
    from d2o.training.distributed import barrier, first_process, process_group
    from d2o.training.run_folder import locked

    sweep = plan_sweep(name, overrides, sweeps, mini)
    for note in sweep.base.notes:
        console.say(note)
    plans = _plan_all(sweep, data, start)
    if plan:
        show_plan(sweep.members[0].recipe, plans[0])
        _show_plans(sweep, plans)
        verdict(plans)
        return
    refused = {
        member.name: "\n".join(map(fit, plan.refused))
        for member, plan in zip(sweep.members, plans, strict=True)
        if plan.refused
    }
    if refused:
        raise UserError("\n".join(f"--sweep: {name}: {why}" for name, why in refused.items()))
    folder, count = out or Path("runs") / (sweep.folder + ("-mini" if mini else "")), len(sweep.members)
    device = open_device(device_name)
    with stop_flag() as stop, process_group(device) as (rank, world), ExitStack() as held:

        def hold() -> None:
            check_output(folder, folder=True)
            held.enter_context(locked(folder))
            clear(folder, "sweep.*")
            for member in sweep.members:
                clear(folder / member.name, "recipe.yaml")

        first_process(hold, device, rank, world)
        check_folder(folder)
        check_same(folder, sweep, start)
        for member in sweep.members:
            check_run(folder / member.name, member.recipe, True, start)
        barrier(world)  # all have looked before one of them writes
        failed: dict[str, str] = {}
        if rank == 0:
            update(folder, sweep, start, failed)
        for i, member in enumerate(sweep.members):
            where = f"{member.name} ({i + 1} of {count})"
            with opened(folder / member.name, member.recipe, True, start, device, rank, world) as unfinished:
                if not unfinished:
                    console.say(f"{where} is finished")
                    continue
                console.say(f"--- {where}")
                try:
                    trainer = begin_run(
                        member.source, overrides, member.recipe, folder / member.name, device, rank, world, start, stop
                    )
                    try:
                        finish_run(trainer, stop)
                    except UserError as error:
                        # The other processes may not have met it; a disk that is full is so for the next member, too.
                        if world > 1 or isinstance(error.__cause__, OSError):
                            raise
                        failed[member.name] = error.message
                        console.error(f"{where}: {error.message}", error.hint)
                    del trainer  # before the next one takes as much memory
                except Stopped as stopped:
                    raise Stopped(
                        f"{where}: {stopped.message}", stopped.exit_code - 128, "the same command continues"
                    ) from stopped
                finally:
                    if rank == 0:
                        update(folder, sweep, start, failed)
                barrier(world)
        if rank == 0:
            show(update(folder, sweep, start, failed), folder)
    if failed:
        raise UserError(
            f"{len(failed)} of {count} runs failed: {', '.join(failed)}",
            "the lines above say why; the same command tries them again",
        )


def _plan_all(sweep: Sweep, data: str | None, start: Path | None) -> list[Plan]:
    """A plan for each member, with what its method would not use."""
    from d2o.recipes.plan import make_plan

    teachers: dict[str, Teacher] = {}
    plans = [make_plan(member.recipe, start, teachers) for member in sweep.members]
    for member, plan in zip(sweep.members, plans, strict=True):
        try:
            check_options(member.recipe, data, start)
        except UserError as error:
            plan.refused.append(str(error))
    return plans


def _show_plans(sweep: Sweep, plans: list[Plan]) -> None:
    """A line for each member, where they differ and where not: the first one's plan is printed in full."""
    table = _table(f"{len(plans)} runs", ("run", "images", "parameters", "memory", "network calls", "disk"))
    for member, plan in zip(sweep.members, plans, strict=True):
        table.add_row(*_cells(member, plan))
    console.table(table)
    for member, plan in zip(sweep.members[1:], plans[1:], strict=True):
        for line in (*plan.missing, *plan.refused):
            if line not in (*plans[0].missing, *plans[0].refused):
                console.out.print(f"{member.name}: {fit(line)}", markup=False)
    calls, disk = sum(plan.network_calls for plan in plans), sum(sum(plan.disk.values()) for plan in plans)
    console.out.print(f"together: {calls:,} network calls, {console.size(disk)} of disk")


def _cells(member: Member, plan: Plan) -> list[str]:
    memory, disk = sum(plan.memory.values()), sum(plan.disk.values())
    return [
        escape(member.name),
        f"{member.recipe.images:,}",
        f"{sum(plan.networks.values()):,}",
        console.size(memory),
        f"{plan.network_calls:,}",
        console.size(disk),
    ]


def show(record: JsonObject, folder: Path) -> None:
    """The members as a table, the best one marked."""
    from d2o.recipes.sweep_record import rows

    metric = record["metric"]
    heads = ("run", "state", "images", f"last {metric}", f"best {metric}", "after images")
    table = _table(f"{record['name']}: {metric} ({record['better']} is better)", heads)
    best = record["best"]["member"] if record["best"] else None
    for m, row in zip(record["members"], rows(record), strict=True):
        table.add_row(*map(escape, row), style="bold" if m["name"] == best else "")
    console.table(table)
    if best is not None:
        console.say(f"best: {best} (checkpoint {folder / best / 'checkpoints' / 'best.safetensors'})")
    pictures = [path.name for path in sorted(folder.glob("sweep.*svg"))]
    pictures += [name for name in ("sweep.png", "sweep.json") if (folder / name).exists()]
    console.say(f"wrote {' and '.join(str(folder / name) for name in pictures)}")


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    return table
