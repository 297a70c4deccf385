"""The printed form of `--plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from d2o.cli import console
from d2o.cli.hints import fit

if TYPE_CHECKING:
    import torch

    from d2o.recipes.plan import Plan
    from d2o.recipes.schema import Recipe


def show_plan(recipe: Recipe, plan: Plan) -> None:
    """Print what `recipe` builds and costs, and whether it would start."""
    title = (
        f"{recipe.name}: method {recipe.method}, {recipe.images:,} images in {plan.iterations:,} iterations of"
        f" {recipe.batch}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("amount", justify="right")
    sections: list[tuple[str, dict[str, str]]] = [
        ("networks (parameters)", {name: f"{n:,}" for name, n in plan.networks.items()}),
        *(
            (
                f"memory per process, fp32{how}{'' if plan.whole else ', as far as it is known'}",
                {**_sizes(memory), "sum": console.size(sum(memory.values()))},
            )
            for how, memory in _strategies(plan).items()
            if memory
        ),
        ("network calls per sample x samples", {name: f"{n:,}" for name, n in plan.calls.items()}),
        ("disk", {name: _decimal(n) for name, n in plan.disk.items()}),
    ]
    for title, rows in sections:
        if rows:
            table.add_row(f"[bold]{title}[/]", "")
            for name, value in rows.items():
                table.add_row(f"  {name}", value)
            table.add_section()
    if table.row_count:
        console.out.print(table)
    for head, lines in (("before it begins", plan.first), ("missing", plan.missing), ("does not fit", plan.refused)):
        for line in lines:
            console.out.print(f"{head}: " + fit(line).replace("\n", "\n  "), markup=False)


def _sizes(parts: Mapping[str, int]) -> dict[str, str]:
    return {name: console.size(n) for name, n in parts.items()}


def _decimal(n: int) -> str:
    """Bytes as disks are sold, and papers say them."""
    unit, power = next(((u, p) for u, p in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if n >= p), ("kB", 1e3))
    return f"{n / power:.3g} {unit}"


def _strategies(plan: Plan) -> dict[str, dict[str, int]]:
    """How a title says it, and the memory."""
    if plan.processes == 1:
        return {"": plan.memory}
    of = f" of {plan.processes}"
    return {f"{of}, strategy replicate": plan.memory, f"{of}, strategy shard": plan.sharded}


def show_fit(recipe: Recipe, plan: Plan, device: torch.device) -> None:
    """Whether the memory that a process needs is there on the device, under each strategy, and what needs less. Nothing
    where the training is not planned, for what is missing."""
    import torch

    from d2o.networks.budget import physical_memory

    on_gpu = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if on_gpu else physical_memory()
    there //= 1 if on_gpu else plan.processes  # those of a machine share its memory
    each = f" for each of {plan.processes} processes" if plan.processes > 1 and not on_gpu else ""
    needs = {
        how: sum(memory.values()) for how, memory in (("replicate", plan.memory), ("shard", plan.sharded)) if memory
    }
    if not needs or not plan.whole:
        return
    several = len(needs) > 1
    said = []
    for how, size in needs.items():
        under = f" under strategy {how}" if several else ""
        said.append(f"{'fits' if size <= there else 'does not fit'}{under} ({console.size(size)})")
    line = f"on {device}, which has {console.size(there)}{each}: it {', '.join(said)}"
    if min(needs.values()) > there or needs.get(recipe.strategy, 0) > there:
        line += f"; less is needed with {', '.join(_levers(recipe))}"
    console.out.print(line, markup=False)


def _levers(recipe: Recipe) -> list[str]:
    """What makes a process need less memory, of what the recipe does not do yet."""
    ways = {
        "checkpointing: true": recipe.checkpointing,
        "precision: bf16": recipe.precision != "fp32",
        "a smaller micro_batch": recipe.micro_batch == 1,
        "strategy: shard on several processes": recipe.strategy == "shard",
        "more processes": recipe.strategy == "replicate",
        "optim.state: 8bit": recipe.optim.state == "8bit" or recipe.strategy == "shard",  # which it does not go with
        "student.lora": recipe.student.lora is not None,
    }
    return [way for way, done in ways.items() if not done]


def verdict(plans: Sequence[Plan]) -> None:
    """The last line of a plan. typer.Exit 1: the command would not start."""
    problems = len({line for plan in plans for line in (*plan.missing, *plan.refused)})
    if problems:
        console.out.print(f"would not start: {'one problem' if problems == 1 else f'{problems} problems'}, above")
        raise typer.Exit(1)
    console.out.print("would start: nothing is missing")
