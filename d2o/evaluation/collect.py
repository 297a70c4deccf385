"""One pass over images, generated or read: every probe looks at every batch, its answers become columns. Images stream
through; none are kept.

On disk (`root`) a pass is a folder of finished chunks named after all that the answers depend on: any number of
processes fill it together (torchrun, or the same command started twice), a killed one is continued, and the result is
the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.evaluation.columns import Columns, FolderColumns, MemoryColumns, begin, chunks, column_intact, join_columns
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import write_error
from d2o.runtime import Say, StopFlag, Stopped
from d2o.version import __version__
from d2o.work.folder import Unit, WorkFolder, fill

CHUNK = 256
"""Images that a kill can lose, at least; a chunk is made of whole batches."""
Tick = Callable[[int], None]
"""Called with the number of images just done."""
OpenMeter = Callable[[str, int], AbstractContextManager[Tick]]
"""meter(what is being worked on, images in all) -> the progress of that work."""


@contextmanager
def silent(title: str, total: int) -> Iterator[Tick]:
    """The meter that shows nothing."""
    yield lambda done: None


@dataclass
class ImageBatch:
    """Images as they are scored: uint8 [k, C, H, W], with class indices [k] (-1: none) and prompts where they have
    them. `floats`: the same in [-1, 1] before they became 8 bits; `latents` [k, ...] where the generator works in
    latents; `other`: the batch to compare with, row by
    row. `seconds`: what generating them took."""

    images: Tensor
    labels: Tensor | None = None
    prompts: list[str] | None = None
    floats: Tensor | None = None
    latents: Tensor | None = None
    other: ImageBatch | None = None
    seconds: float | None = None


class Probe(Protocol):
    """Something that is asked of every image. `identity`: what its answers depend on."""

    identity: JsonObject

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        """{column: [k, ...]}."""


@dataclass(frozen=True)
class Pass:
    """`make(numbers)` gives the images of these numbers of 0 .. n - 1; `identity`: what they depend on."""

    title: str
    n: int
    batch: int
    make: Callable[[range], ImageBatch]
    probes: Sequence[Probe]
    identity: JsonObject

    @property
    def record(self) -> JsonObject:
        probes = [probe.identity for probe in self.probes]
        return {
            "images": self.identity,
            "n": self.n,
            "batch": self.batch,
            "probes": probes,
            "d2o": __version__,
            "torch": torch.__version__,
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.record, sort_keys=True, default=str).encode()).hexdigest()


def collect(
    work: Pass,
    root: Path | None = None,
    progress: Tick = lambda done: None,
    stop: StopFlag | None = None,
    say: Say = lambda message: None,
) -> Columns:
    """Make (or continue, or share) the pass. `root` None: in memory. Chunks found damaged are made again, and `say` is
    told.

    UserError as its parts raise; Stopped: `stop` was set.
    """
    chunk = -(-max(1, min(CHUNK, work.n)) // work.batch) * work.batch
    if root is None:
        memory = MemoryColumns(work.n, work.batch)
        for start in range(0, work.n, work.batch):
            part, seconds = _measure(work, range(start, min(start + work.batch, work.n)))
            memory.parts.append(join_columns([part]))
            memory.seconds += seconds
            progress(len(part[next(iter(part))]))
        return memory
    folder, units = begin(root / work.fingerprint[:24], work.record), chunks(work.n, chunk)
    checked = _checked(folder, units, say)
    shown = work.n - sum(unit.n for unit in folder.left(units))
    if shown:
        getattr(progress, "found", progress)(shown)  # made earlier: not a matter of this run's speed

    def show(done: int) -> None:
        nonlocal shown
        if done > shown:
            progress(done - shown)
            shown = done

    def make(unit: Unit, before: int) -> tuple[dict[str, Tensor], list[float]] | None:
        parts, seconds = [], []
        for start in range(unit.start, unit.start + unit.n, work.batch):
            if stop:
                return None
            part, took = _measure(work, range(start, min(start + work.batch, unit.start + unit.n)))
            parts.append(part)
            seconds += took
            show(before + start + len(part[next(iter(part))]) - unit.start)
        return join_columns(parts), seconds

    def write(unit: Unit, made: tuple[dict[str, Tensor], list[float]]) -> JsonObject:
        try:
            saved = folder.save(unit.file, made[0], {"start": unit.start, "n": unit.n, "seconds": made[1]})
        except OSError as error:
            raise write_error(folder.path, error) from error
        checked.add(unit.file)
        return {"file": unit.file, "start": unit.start, "n": unit.n, **saved}

    if not fill(folder, units, make, write, stop):
        kept = work.n - sum(unit.n for unit in folder.left(units))
        number = stop.received if stop is not None else 0
        raise Stopped(
            f"stopped with {kept:,} of {work.n:,} images of {work.title}; run the same command again to continue",
            number,
        )
    show(work.n)
    return FolderColumns(folder, units, work.n, work.batch, checked)


def _checked(folder: WorkFolder, units: Sequence[Unit], say: Say) -> set[str]:
    """The finished chunks, each read once and compared with its digest. A damaged one goes: it is made again."""
    good, recorded = set(), folder.recorded()
    left = {unit.file for unit in folder.left(units)}
    for unit in units:
        if unit.file in left:
            continue
        if column_intact(folder, recorded[unit.file]):
            good.add(unit.file)
        else:
            say(f"{folder.path / unit.file} was damaged; its {unit.n:,} images are measured again")
            folder.local(unit.file).unlink(missing_ok=True)
    return good


def _measure(work: Pass, numbers: range) -> tuple[dict[str, Tensor], list[float]]:
    batch = work.make(numbers)
    columns: dict[str, Tensor] = {}
    for probe in work.probes:
        columns |= probe(batch)
    whole = batch.seconds is not None and len(numbers) == min(work.batch, work.n)
    return columns, [batch.seconds] if whole and batch.seconds is not None else []


def check_images(images: Tensor, seeds: Sequence[int], who: str) -> None:
    """UserError that counts the images with NaN or infinite values, as a collapsed student makes them."""
    bad = int((~torch.isfinite(images).flatten(1).all(1)).sum())
    if bad:
        raise UserError(
            f"{who}: {bad} of {len(seeds)} images (seeds {seeds[0]} to {seeds[-1]}) hold NaN or infinite values",
            "a collapsed student: take an earlier checkpoint, or train with a lower learning rate",
        )


def clock(device: str | torch.device) -> float:
    """Seconds, once everything asked of the device so far is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
