"""What subcommands open by name: a device, a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from d2o.cli import console
from d2o.errors import UserError

if TYPE_CHECKING:
    import torch

    from d2o.teachers.base import Teacher


GUIDE = typer.Option(
    None,
    "--guide",
    help=(
        "A second network to guide by, in place of the teacher without its condition: edm2-img512-xs-uncond for EDM2,"
        " or any teacher of the EDM family. Needs --cfg."
    ),
    show_default=False,
)


def open_teacher(name: str, device: str | None) -> Teacher:
    """Load a teacher, with a bar for the download if it takes one."""
    from d2o.teachers.registry import load_teacher

    with console.progress_bar("download", "MB") as bar:
        return load_teacher(
            name,
            open_device(device),
            say=console.say,
            progress=lambda done, total: bar(done // 10**6, (total or done) // 10**6, ""),
        )


def check_guide(guide: str | None, guided: bool) -> None:
    """UserError: --guide without guidance."""
    if guide is not None and not guided:
        raise UserError(f"--guide {guide} needs --cfg: at 1 there is no guidance", "EDM2-XS: --cfg 1.4")


def open_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is. UserError: no such device, or not usable here."""
    from d2o.training.distributed import pick_device

    return pick_device(name)
