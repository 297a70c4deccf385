"""`d2o teachers`."""

from __future__ import annotations

import typer

from d2o.cli import complete, console
from d2o.errors import unknown


def teachers(
    name: str = typer.Argument(
        None, help="Say more about one of them.", show_default=False, autocompletion=complete.of("teachers")
    ),
) -> None:
    """List the teachers that have a name: parameters, licence, and whether they are on this machine.

    Any other teacher is given by its path: a .safetensors checkpoint or run of `d2o train`, an NVIDIA .pkl, a diffusers
    folder, or as owner/name of a repository on the hub.
    """
    from rich import box
    from rich.table import Column, Table

    from d2o.interop import catalogue
    from d2o.teachers.registry import teacher_names

    if name is not None:
        return _one(name)
    table = Table(
        Column("name", no_wrap=True), Column("parameters", justify="right"), "licence", "here", box=box.SIMPLE
    )
    for known in teacher_names():
        entry = catalogue.find(known)
        if entry is None:
            table.add_row(known, "", "CC-BY-4.0", "ships with d2o")
        else:
            table.add_row(
                known, f"{entry.parameters:,}", entry.licence, "yes" if catalogue.path_if_here(entry) else "on demand"
            )
    console.out.print(table)


def _one(name: str) -> None:
    from d2o.interop import catalogue
    from d2o.interop.assets import asset
    from d2o.teachers.registry import BUILTIN, teacher_names

    if name in BUILTIN:
        console.out.print(f"{name} ships with d2o: {asset(BUILTIN[name])}", markup=False)
        return
    if (published := catalogue.find(name)) is None:
        raise unknown("teacher", name, teacher_names())
    lines = {
        "what": published.about,
        "parameters": f"{published.parameters:,}",
        "from": published.source,
        "revision": published.revision,
        "sha256": published.sha256 or "not published; that of the first download is kept and checked",
        "licence": f"{published.licence} ({published.licence_url})",
        "usual sampling": (
            f"{published.solver}, {published.steps} steps" + (f", cfg {published.cfg:g}" if published.cfg != 1 else "")
        ),
        "resolution": f"{published.resolution} px",
        "here": catalogue.path_if_here(published) or f"no; fetched on demand, or put it at {published.place}",
    }
    for key, value in lines.items():
        if value is not None:
            console.out.print(f"{key:>15}  {value}", markup=False)
