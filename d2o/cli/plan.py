"""The printed form of `--plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from d2o.cli import console


def size(n: int) -> str:
    """Bytes, readable."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def show_plan(recipe: Any, start: Path | None) -> None:
    """Print what `recipe` builds and costs; creates nothing."""
    from d2o.recipes.plan import make_plan

    plan = make_plan(recipe, start)
    title = f"{recipe.name}: method {recipe.method}, {recipe.images:,} images in {plan.iterations:,} iterations of {recipe.batch}"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("amount", justify="right")
    sections: list[tuple[str, dict[str, str]]] = [
        ("networks (parameters)", {name: f"{n:,}" for name, n in plan.networks.items()}),
        ("memory per process, fp32", {name: size(n) for name, n in plan.memory.items()}),
        ("network calls per sample x samples", {name: f"{n:,}" for name, n in plan.calls.items()}),
        ("disk", {name: size(n) for name, n in plan.disk.items()}),
    ]
    for title, rows in sections:
        if rows:
            table.add_row(f"[bold]{title}[/]", "")
            for name, value in rows.items():
                table.add_row(f"  {name}", value)
            if title.startswith("memory"):
                table.add_row("  sum", size(sum(plan.memory.values())))
            table.add_section()
    console.out.print(table)
    if plan.refused:
        console.out.print("cannot be trained: " + "; ".join(plan.refused), markup=False)
    console.out.print("missing: " + ("; ".join(plan.missing) if plan.missing else "nothing"), markup=False)
