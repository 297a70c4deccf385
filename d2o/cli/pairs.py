"""`d2o pairs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2o.cli import console
from d2o.errors import UserError

if TYPE_CHECKING:
    import torch


def pairs(
    teacher: str = typer.Option(None, "--teacher", help="Builtin teacher (digits), or a .safetensors checkpoint.", show_default=False),
    n: int = typer.Option(None, "--n", "-n", help="Number of pairs.", show_default=False),
    out: Path = typer.Option(None, "--out", help="Folder of the store; a store that was begun there is continued.", show_default=False),
    solver: str = typer.Option("heun", "--solver", help="ODE solver: heun or euler."),
    steps: int = typer.Option(18, "--steps", help="Solver steps; heun makes 2 x steps - 1 network calls a pair, euler steps."),
    seed: int = typer.Option(0, "--seed", help="Seed of the first pair; pair i has seed + i."),
    labels: str = typer.Option("random", "--labels", help="Classes: random (from the pair's seed), balanced, or indices in turn: 0,1,2."),
    cfg: float = typer.Option(1.0, "--cfg", help="Guidance weight; 1 is none, others call the network twice a step."),
    batch: int = typer.Option(None, "--batch", help="Pairs per teacher call (256); a begun store keeps its own.", show_default=False),
    shard_size: int = typer.Option(1024, "--shard-size", help="Pairs per file."),
    dtype: str = typer.Option("fp32", "--dtype", help="Number format of the targets on disk: fp32, fp16 or bf16."),
    store_noise: bool = typer.Option(False, "--store-noise", help="Keep the noise in the store instead of deriving it from the seeds."),
    device: str = typer.Option(None, "--device", help="cpu, cuda or cuda:N. Default: CUDA if there is one.", show_default=False),
    threads: int = typer.Option(None, "--threads", help="CPU threads of torch. Default: torch's own; a begun store keeps its own.",
                                show_default=False),
    verify: Path = typer.Option(None, "--verify", metavar="DIR", help="Only check every checksum of the store DIR.", show_default=False),
) -> None:  # fmt: skip
    """Make pairs of noise and a teacher's output, to train students on.

    The same command again continues a store that was interrupted in any way, and makes shards again that are missing. Several workers may
    run it at once on the same folder (the same command started twice, or under torchrun): each takes any unfinished shard.

    A pair is a function of its seed and label. With the same --batch, --threads and kind of device (kept in manifest.json and taken by
    every worker) the files have the same bytes however many workers made them; with others the values agree to rounding, about 1e-5.
    """
    if verify is not None:
        _verify(verify)
        return
    for name, value in (("--teacher", teacher), ("--n", n), ("--out", out)):
        if value is None:
            raise UserError(f"{name} is missing", "for example: d2o pairs --teacher digits --n 8192 --out runs/pairs")

    from d2o.runtime import stop_flag
    from d2o.teachers.generate import PairSettings, make_pairs

    settings = PairSettings(teacher, n, seed, solver, steps, cfg, labels, shard_size, dtype, store_noise)
    with stop_flag() as stop, progress_bar("pairs", "pairs") as progress:
        store = make_pairs(
            settings, out, batch=batch, threads=threads, device=open_device(device), say=console.say, progress=progress, stop=stop
        )  # fmt: skip
    console.say(f"{out}: {len(store):,} pairs of {store.settings.nfe} network calls in {len(store.manifest['shards'])} shards")


def _verify(folder: Path) -> None:
    from d2o.data.pairs import PairSettings, store_folder, verify

    with progress_bar("verify", "pairs") as progress:
        problems = verify(folder, progress)
    manifest = store_folder(folder).manifest() or {}
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        command = PairSettings.from_manifest(manifest).command(folder)
        hint = f"to repair: delete the files named, if they exist, and run: {command}"
        raise UserError(f"{folder} has {len(problems)} bad shards:\n  " + "\n  ".join(problems[:20] + more), hint)
    count = f"{len(manifest['shards'])} shards ({manifest['settings']['n']:,} pairs)"
    console.out.print(f"{folder}: all {count} are as they were made", markup=False)


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callback progress(done, total, note) whose bar appears with the first call."""
    bars: list[console.Meter] = []

    def progress(done: int, total: int, note: str) -> None:
        if not bars:
            bars.append(console.Meter(title, total, unit, done))
        bars[0].update(done, note)

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()


def open_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is. UserError: no such device, or not usable here."""
    import torch

    from d2o.training.distributed import pick_device

    try:
        device = pick_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).strip().splitlines()[0]}", "known: cpu, cuda, cuda:N") from error
    return device
