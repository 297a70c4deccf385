"""Making pair stores: a teacher, many seeds, any number of workers. Nothing depends on who makes which shard, or when."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2o.data.draws import draw_some
from d2o.data.images import to_uint8
from d2o.data.pair_files import Made, adopt_shard, store_folder, write_shard
from d2o.data.pair_settings import DTYPES, PairSettings, check_probe, differences, new_manifest
from d2o.data.pairs import PairStore
from d2o.data.prompts import Prompts, open_prompts
from d2o.data.work import Unit, ahead, fill
from d2o.diffusion.noise import StepNoise
from d2o.errors import UserError
from d2o.networks.processor import AUTO, explain_precision
from d2o.runtime import StopFlag, Stopped, worker
from d2o.teachers.base import Teacher
from d2o.teachers.compute import Compute, join_compute, torch_threads, tune
from d2o.teachers.registry import load_teacher

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]
"""progress(done, total, note)"""


@dataclass(frozen=True)
class Share:
    """Worker `index` of `count` begins with every count-th shard from its own number on; then, unless `only`, it helps with the others'."""

    index: int = 0
    count: int = 1
    only: bool = False

    @classmethod
    def parse(cls, text: str | None, only: bool = False) -> Share:
        """From "2/8"; without text from torchrun's environment, else a worker alone. UserError: not of that form, or out of range."""
        if text is None:
            return cls(*worker(), only)
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit()) or int(index) >= int(count):
            raise UserError(f"worker {text!r}: expected INDEX/COUNT, counted from 0, like 0/8 to 7/8")
        return cls(int(index), int(count), only)

    def order(self, units: list[Unit]) -> list[Unit]:
        own = units[self.index :: self.count]
        if self.only:
            return own
        start = self.index * len(units) // self.count  # workers that help do not all begin at the same shard
        mine = {unit.file for unit in own}
        return own + [unit for unit in units[start:] + units[:start] if unit.file not in mine]


def make_pairs(
    settings: PairSettings,
    out: str | Path,
    *,
    compute: Compute = Compute(),
    share: Share = Share(),
    device: str | torch.device = "cpu",
    say: Say = lambda message: None,
    progress: Progress = lambda done, total, note: None,
    stop: StopFlag | None = None,
    teacher: Teacher | None = None,
    prompts: Prompts | None = None,
) -> PairStore | None:
    """Make or continue the store `out`; returns when it is finished, whether by this process or by others that work on it (None if only this
    worker's own share is).

    `compute` holds for a new store; one that was begun keeps its own, since the last bits depend on it. `teacher` and `prompts` save
    loading settings.teacher and settings.prompts. Raises UserError: bad settings, another store or foreign files at `out`, unwritable, a
    target that is not finite (named by its seed); Stopped: `stop` was set; work is saved.
    """
    settings.check()
    compute.check()
    teacher = teacher or load_teacher(settings.teacher, device)
    spec, folder = teacher.spec, store_folder(out)
    settings = settings.resolved(spec.solver, spec.steps)
    settings.check()
    prompts = _prompts(settings, teacher, prompts)
    teacher.check_cfg(settings.cfg)
    if settings.decode and spec.space == "pixel":
        raise UserError(f"--decode: teacher {spec.name!r} works on pixels, its outputs are the images", "leave --decode away")
    settings.ode.grid(teacher.schedule)  # what does not fit this teacher is refused before any work
    about = {"name": settings.teacher, "sha256": teacher.fingerprint, "licence": spec.licence}
    described = None if prompts is None else {"path": str(settings.prompts), "sha256": prompts.sha256, "count": len(prompts)}
    new = new_manifest(settings, about, spec.to_dict(), compute.describe(settings.shard_size, teacher.device, teacher.network), described)
    manifest = folder.open(new)
    if different := differences(manifest, new):
        hint = "choose another --out, or the settings it was made with"
        raise UserError(f"{out} is a pair store with other settings:\n  " + "\n  ".join(different), hint)
    settings = PairSettings.from_manifest(manifest)
    units = settings.units()
    check_probe(manifest, out)
    if not folder.left(units):
        say(f"{out} holds all {settings.n:,} pairs already; nothing to do")
        folder.close()
        return PairStore(out)
    recorded = join_compute(manifest["compute"], new["compute"], str(out), say, compute.asked)
    if compute.precision == AUTO:
        say(explain_precision(recorded.get("precision", "fp32"), teacher.device))
    tune(teacher, recorded)
    if lost := [unit.file for unit in folder.left(units) if unit.file in folder.recorded()]:
        say(f"{out}: {len(lost)} shards are missing or cut short and are made again, {lost[0]} first")
    # Prompts that return are kept encoded (in bounded memory); to keep others would only fill it.
    teacher.expect_prompts(prompts is not None and settings.n > settings.per_prompt * len(prompts))
    maker, timing = _Maker(settings, teacher, recorded["batch"], prompts, progress, stop), _Timing(folder, teacher)

    def write(unit: Unit, made: Made) -> dict[str, Any]:
        entry = write_shard(folder, manifest, unit, made)
        timing.add(unit)
        return entry

    with torch_threads(recorded["threads"]):
        mine = share.order(units) if share.count > 1 else folder.order(units)
        finished = fill(folder, mine, maker.make, write, stop, partial(adopt_shard, folder, manifest))
    if not finished:
        made = settings.n - sum(unit.n for unit in folder.left(units))
        number = stop.received if stop is not None else 0
        raise Stopped(f"stopped with {made:,} of {settings.n:,} pairs in {out}; to continue: {settings.command(out)}", number)
    if left := folder.left(units):
        say(f"{out}: share {share.index}/{share.count} is finished; {len(left)} of {len(units)} shards are other workers'")
        return None
    folder.close()
    if maker.shown < settings.n:  # others made the rest
        progress(settings.n, settings.n, "")
    return PairStore(out)


def _prompts(settings: PairSettings, teacher: Teacher, opened: Prompts | None) -> Prompts | None:
    """The prompts where the teacher takes text. UserError: none given, or given to another."""
    if teacher.spec.condition != "text":
        if settings.prompts is not None:
            raise UserError(f"teacher {teacher.spec.name!r} takes no prompts (condition: {teacher.spec.condition})", "leave --prompts away")
        return None
    if settings.prompts is None:
        raise UserError(f"teacher {teacher.spec.name!r} is conditioned on text", "give --prompts FILE (.txt, one a line; .jsonl; .parquet)")
    if settings.labels not in ("random", "none", "text"):
        raise UserError(f"teacher {teacher.spec.name!r} is conditioned on text; it takes no labels", "leave --labels away")
    return opened if opened is not None else open_prompts(settings.prompts)


class _Maker:
    """Makes the content of one shard."""

    def __init__(self, settings: PairSettings, teacher: Teacher, batch: int, prompts: Prompts | None, progress: Progress, stop: StopFlag | None):
        self.settings, self.teacher, self.batch, self.prompts, self.progress, self.stop = settings, teacher, batch, prompts, progress, stop
        self.solver, self.shown = settings.ode, 0

    def make(self, unit: Unit, before: int) -> Made | None:
        """None when `stop` was seen. `before`: pairs that exist already."""
        settings, shape = self.settings, self.teacher.spec.shape
        target = torch.empty(unit.n, *shape, dtype=DTYPES[settings.dtype])
        noises, labels, texts, images = [], [], [], []
        cuts = [(first, min(self.batch, unit.n - first)) for first in range(0, unit.n, self.batch)]
        # A compiled network is given batches of one size only: it would be compiled anew for another, with other last bits.
        size = self.batch if self.teacher.call is not self.teacher.network else 1
        for (first, count), drawn in zip(cuts, ahead(lambda cut: self.draw(unit.start + cut[0], max(cut[1], size)), cuts)):
            if self.stop:
                return None
            condition: Any = drawn.prompts if drawn.prompts is not None else drawn.labels
            x = self.teacher.sample(drawn.start, condition, self.solver, cfg=settings.cfg, randn=drawn.steps)[:count]
            drawn = drawn.first(count)
            target[first : first + count] = x.cpu()
            check_finite(target[first : first + count], settings.seed + unit.start + first, f"teacher {settings.teacher}", settings.dtype)
            if settings.decode:
                with torch.inference_mode():
                    images.append(to_uint8(self.teacher.decode(x)).cpu())
            noises.append(drawn.noise)
            labels += [] if drawn.labels is None else [drawn.labels]
            texts += drawn.prompts or []
            self.shown = before + first + count
            self.progress(self.shown, settings.n, "")
        return Made(torch.cat(noises), target, torch.cat(labels) if labels else None, texts if self.prompts else None,
                    torch.cat(images) if images else None)  # fmt: skip

    def draw(self, start: int, n: int) -> _Drawn:
        """What pairs start .. start + n - 1 are made from; beyond the last pair it is drawn again."""
        settings, spec = self.settings, self.teacher.spec
        mine = [min(i, settings.n - 1) for i in range(start, start + n)]
        sources = [int(settings.sources(i, 1)[0]) for i in mine]
        begin, labels = draw_some(settings.seed, sources, spec.shape, spec.classes, settings.labels)
        noise = begin if settings.rewire == "none" else draw_some(settings.seed, mine, spec.shape, 0, "none")[0]
        texts = None
        if self.prompts is not None:
            texts = self.prompts.many([int(settings.prompt_numbers(i, 1, len(self.prompts))[0]) for i in sources])
        drawn_classes = spec.classes if settings.labels == "random" else 0
        steps = StepNoise([settings.seed + i for i in sources], spec.shape, drawn_classes) if self.solver.stochastic else None
        return _Drawn(noise, begin, labels, texts, steps)


@dataclass
class _Drawn:
    """`noise` is what the pairs say they began with, `start` what the teacher begins with: another where pairs are rewired."""

    noise: Tensor
    start: Tensor
    labels: Tensor | None
    prompts: list[str] | None
    steps: StepNoise | None

    def first(self, n: int) -> _Drawn:
        labels, prompts = None if self.labels is None else self.labels[:n], None if self.prompts is None else self.prompts[:n]
        return _Drawn(self.noise[:n], self.start[:n], labels, prompts, self.steps)


class _Timing:
    """How fast this worker is, for `d2o pairs --stats`: kept beside the store, and no part of what it holds."""

    def __init__(self, folder: Any, teacher: Teacher):
        self.folder, self.begun, self.pairs = folder, time.perf_counter(), 0
        device = torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else teacher.device.type
        self.name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self.record = {"worker": f"{socket.gethostname()}-{os.getpid()}", "device": device, "threads": torch.get_num_threads()}

    def add(self, unit: Unit) -> None:
        self.pairs += unit.n
        seconds = time.perf_counter() - self.begun
        self.folder.note(self.name, {**self.record, "pairs": self.pairs, "seconds": round(seconds, 3)})


def check_finite(x: Tensor, seed: int, source: str, dtype: str = "fp32") -> None:
    """UserError that names the seed of the first sample of x [k, ...] with a value that is not a number or infinite."""
    bad = ~torch.isfinite(x).flatten(1).all(1)
    if bad.any():
        hint = "the weights may be damaged" + ("" if dtype == "fp32" else f", or {dtype} too narrow: try --dtype fp32")
        raise UserError(f"{source} gives values that are not finite for seed {seed + int(bad.nonzero()[0])}", hint)
