"""Making pair stores: a teacher, many seeds, any number of workers. Nothing depends on who makes which shard, or when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2o.data.draws import draw
from d2o.data.pairs import DTYPES, PairSettings, PairStore, adopt_shard, check_probe, differences, new_manifest, store_folder, write_shard
from d2o.data.work import Unit, ahead, fill
from d2o.errors import UserError
from d2o.runtime import StopFlag, Stopped
from d2o.teachers.base import Teacher
from d2o.teachers.registry import load_teacher

BATCH = 256
Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]
"""progress(done, total, note)"""


def make_pairs(
    settings: PairSettings,
    out: str | Path,
    *,
    batch: int | None = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    say: Say = lambda message: None,
    progress: Progress = lambda done, total, note: None,
    stop: StopFlag | None = None,
    teacher: Teacher | None = None,
) -> PairStore:
    """Make or continue the store `out`; returns when it is finished, whether by this process or by others that work on it.

    `batch` (pairs per teacher call, 256) and `threads` (of torch; the process's own number) hold for a new store; one that was begun keeps
    its own, since the last bits depend on them. `teacher` saves loading settings.teacher. Raises UserError: bad settings, another store or
    foreign files at `out`, unwritable, a target that is not finite (named by its seed); Stopped: `stop` was set; work is saved.
    """
    settings.check()
    teacher = teacher or load_teacher(settings.teacher, device)
    spec, folder = teacher.spec, store_folder(out)
    if settings.cfg != 1 and spec.condition == "none":
        raise UserError(f"guidance (cfg {settings.cfg:g}) needs a condition, but teacher {spec.name!r} takes none")
    about = {"name": settings.teacher, "sha256": teacher.fingerprint, "licence": spec.licence}
    compute = describe_compute(batch, settings.shard_size, threads, teacher.device)
    mine = new_manifest(settings, about, spec.to_dict(), compute)
    manifest = folder.open(mine)
    if different := differences(manifest, mine):
        hint = "choose another --out, or the settings it was made with"
        raise UserError(f"{out} is a pair store with other settings:\n  " + "\n  ".join(different), hint)
    settings, units = PairSettings.from_manifest(manifest), PairSettings.from_manifest(manifest).units()
    check_probe(manifest, out)
    if not folder.left(units):
        say(f"{out} holds all {settings.n:,} pairs already; nothing to do")
        folder.close()
        return PairStore(out)
    compute = join_compute(manifest["compute"], mine["compute"], str(out), say, ("batch", batch), ("threads", threads))
    if lost := [unit.file for unit in folder.left(units) if unit.file in folder.recorded()]:
        say(f"{out}: {len(lost)} shards are missing or cut short and are made again, {lost[0]} first")

    shown = 0

    def make(unit: Unit, before: int) -> tuple[Tensor, Tensor | None, Tensor] | None:
        nonlocal shown
        target = torch.empty(unit.n, *spec.shape, dtype=DTYPES[settings.dtype])
        cuts = [(first, min(compute["batch"], unit.n - first)) for first in range(0, unit.n, compute["batch"])]
        drawn = ahead(lambda cut: draw(settings.seed, unit.start + cut[0], cut[1], spec.shape, spec.classes, settings.labels), cuts)
        noises, labels = [], []
        for (first, count), (noise, label) in zip(cuts, drawn, strict=True):
            if stop:
                return None
            x = teacher.sample(noise, label, settings.solver, settings.steps, settings.cfg)
            target[first : first + count] = x.cpu()
            check_finite(target[first : first + count], settings.seed + unit.start + first, f"teacher {settings.teacher}", settings.dtype)
            noises.append(noise)
            labels += [] if label is None else [label]
            shown = before + first + count
            progress(shown, settings.n, "")
        return torch.cat(noises), torch.cat(labels) if labels else None, target

    with torch_threads(compute["threads"]):
        finished = fill(folder, units, make, partial(write_shard, folder, manifest), stop, partial(adopt_shard, folder, manifest))
    if not finished:
        made = settings.n - sum(unit.n for unit in folder.left(units))
        number = stop.received if stop is not None else 0
        raise Stopped(f"stopped with {made:,} of {settings.n:,} pairs in {out}; to continue: {settings.command(out)}", number)
    folder.close()
    if shown < settings.n:  # others made the rest
        progress(settings.n, settings.n, "")
    return PairStore(out)


def describe_compute(batch: int | None, most: int, threads: int | None, device: torch.device) -> dict[str, Any]:
    """What the last bits of a network's output depend on, besides the network and its input. There are no batches larger than `most`.

    UserError: batch or threads below 1.
    """
    for name, value in (("batch", batch), ("threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    batch, threads = min(batch or BATCH, most), threads or torch.get_num_threads()
    return {"batch": batch, "threads": threads, "device": device.type, "torch": torch.__version__, "processor": processor}


def join_compute(recorded: dict[str, Any], mine: dict[str, Any], out: str, say: Say, *asked: tuple[str, int | None]) -> dict[str, Any]:
    """The recorded way to compute, which everyone who works on `out` takes; says so where something else was `asked` for (name, value).

    UserError: begun on another kind of device.
    """
    if recorded["device"] != mine["device"]:
        was, now = recorded["device"], mine["device"]
        raise UserError(f"{out} was begun on {was}; this would go on with {now}", f"give --device {was}, or choose another --out")
    if fixed := [f"{name} {recorded[name]}" for name, value in asked if value is not None and recorded[name] != mine[name]]:
        say(f"{out} was begun with {', '.join(fixed)}; it goes on with that")
    if other := [f"{name} {recorded[name]} (here {mine[name]})" for name in ("torch", "processor") if recorded[name] != mine[name]]:
        say(f"{out} was begun with {', '.join(other)}: what is made here may differ in the last digits")
    return recorded


def check_finite(x: Tensor, seed: int, source: str, dtype: str = "fp32") -> None:
    """UserError that names the seed of the first sample of x [k, ...] with a value that is not a number or infinite."""
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        hint = "the weights may be damaged" + ("" if dtype == "fp32" else f", or {dtype} too narrow: try --dtype fp32")
        raise UserError(f"{source} gives values that are not finite for seed {seed + int(bad.nonzero()[0])}", hint)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Compute with that many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
