"""Making pair stores: a teacher, many seeds, any number of workers. Nothing depends on who makes which shard, or
when."""

from __future__ import annotations

import copy
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from d2o.data.draws import label_mode
from d2o.data.pair_files import ShardContent, adopt_shard, shard_record, store_folder, write_shard
from d2o.data.pair_reading import read_shard
from d2o.data.pair_record import check_manifest
from d2o.data.pair_settings import REWIRED, PairSettings, check_probe, differences, new_manifest, with_n
from d2o.data.pair_tools import ShardProgress
from d2o.data.pairs import PairStore
from d2o.data.prompt_files import open_prompts
from d2o.data.prompts import Prompts
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.networks.processor import AUTO, explain_precision
from d2o.runtime import Say, StopFlag, Stopped, worker
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.compute import Compute, changes, join_compute, torch_threads, tune
from d2o.teachers.pair_maker import Maker
from d2o.teachers.registry import load_teacher
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.work.folder import MANIFEST, SharedFolder, Unit, fill


@dataclass(frozen=True)
class Share:
    """Worker `index` of `count` begins with every count-th shard from its own number on; then, unless `only`, it helps
    with the others'."""

    index: int = 0
    count: int = 1
    only: bool = False

    @classmethod
    def parse(cls, text: str | None, only: bool = False) -> Share:
        """From "2/8"; without text from torchrun's environment, else a worker alone. UserError: not of that form, or
        out of range."""
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
    progress: ShardProgress = lambda done, total, note: None,
    stop: StopFlag | None = None,
    teacher: Teacher | None = None,
    lent: bool = False,
    prompts: Prompts | None = None,
) -> PairStore | None:
    """Make or continue the store `out`; returns when it has settings.n pairs, whether made by this process or by others
    that work on it (None if only this worker's own share is made). What is returned are the first settings.n pairs of
    those that are there.

    A store grows when it is asked for more pairs than it has: pair i depends on its seed and condition alone. Its
    manifest then says so at once; every worker makes what its own n needs, in shards as large as the store now has
    them. Asked for fewer pairs it is left as it is.

    `compute` holds for a new store; one that was begun keeps its own, since the last bits depend on it. `teacher` and
    `prompts` save loading settings.teacher and settings.prompts. A teacher that is `lent` stays as it is: where running
    as `compute` says would change it, a copy is run.

    Raises UserError: bad settings, another store or foreign files at `out`, unwritable, a target that is not finite
    (named by its seed), another size for a rewired store; Stopped: `stop` was set; work is saved.
    """
    settings.check()
    compute.check()
    teacher = teacher or load_teacher(settings.teacher, device)
    spec, folder = teacher.spec, store_folder(out)
    settings = settings.resolved(spec.solver, spec.steps)
    settings.check()
    settings, teacher, own = _without_prompt(settings, teacher)
    prompts = _prompts(settings, teacher, prompts)
    teacher.check_cfg(settings.cfg)
    if settings.decode and not spec.latent:
        raise UserError(
            f"--decode: teacher {spec.name!r} works on pixels, its outputs are the images", "leave --decode away"
        )
    settings.ode.grid(teacher.schedule)  # what does not fit this teacher is refused before any work
    about = {"name": settings.teacher, "sha256": teacher.fingerprint, "licence": spec.licence}
    described = (
        None if prompts is None else {"path": str(settings.prompts), "sha256": prompts.sha256, "count": len(prompts)}
    )
    new = new_manifest(
        settings,
        about,
        spec.to_dict(),
        compute.describe(settings.shard_size, teacher.device, teacher.network),
        described,
    )
    n = settings.n
    manifest = _begun(folder, new, out, own)
    if (
        not folder.left(PairSettings.from_manifest(with_n(manifest, min(n, manifest["settings"]["n"]))).units())
        and n <= manifest["settings"]["n"]
    ):
        more = (
            f"{manifest['settings']['n']:,} pairs already, and so the first {n:,}"
            if n < manifest["settings"]["n"]
            else f"all {n:,} pairs already"
        )
        say(f"{out} holds {more}; nothing to do")
        folder.close(_complete(folder))
        return PairStore(out, n=n)
    if n > manifest["settings"]["n"]:
        say(f"{out} grows from {manifest['settings']['n']:,} to {n:,} pairs")
    manifest = grow(folder, n)
    settings = PairSettings.from_manifest(manifest)
    units = [unit for unit in settings.units() if unit.start < n]
    recorded = join_compute(manifest["compute"], new["compute"], str(out), say, compute.asked)
    if compute.precision == AUTO:
        say(explain_precision(recorded.get("precision", "fp32"), teacher.device))
    if lent and changes(recorded):
        teacher = copy.deepcopy(teacher)
    tune(teacher, recorded)
    listed = folder.recorded()
    if lost := [unit.file for unit in folder.left(units) if unit.file in listed and listed[unit.file]["n"] == unit.n]:
        say(f"{out}: {len(lost)} shards are missing or cut short and are made again, {lost[0]} first")
    # Prompts that return are kept encoded (in bounded memory); to keep others would only fill it.
    teacher.expect_prompts(prompts is not None and settings.n > settings.per_prompt * len(prompts))
    timing = _Timing(folder, teacher)
    maker = Maker(
        settings, teacher, recorded["batch"], prompts, progress, stop, partial(_begun_shard, folder, manifest)
    )

    def write(unit: Unit, made: ShardContent) -> JsonObject:
        entry = write_shard(folder, manifest, unit, made)
        timing.add(unit)
        return entry

    with torch_threads(recorded["threads"]):
        mine = share.order(units) if share.count > 1 else folder.order(units)
        finished = fill(folder, mine, maker.make, write, stop, partial(adopt_shard, folder, manifest))
    whole = sum(unit.n for unit in units)
    if not finished:
        made = whole - sum(unit.n for unit in folder.left(units))
        number = stop.received if stop is not None else 0
        raise Stopped(
            f"stopped with {made:,} of {settings.n:,} pairs in {out}; to continue: {settings.command(out)}", number
        )
    if left := folder.left(units):
        say(
            f"{out}: share {share.index}/{share.count} is finished; {len(left)} of {len(units)} shards are other"
            " workers'"
        )
        return None
    grow(
        folder, n
    )  # where there are no locks, a worker that ended at the same moment may have written the number of before
    folder.close(_complete(folder))
    if maker.shown < whole:  # others made the rest
        progress(whole, whole, "")
    return PairStore(out, n=n)


def _without_prompt(settings: PairSettings, teacher: Teacher) -> tuple[PairSettings, Teacher, str | None]:
    """The settings with what XL's guidance takes for no prompt, a teacher that does so (another object, with the same
    network, where this one does otherwise), and what this one does. UserError: one is asked for of another teacher."""
    own = teacher.sdxl_uncond if isinstance(teacher, StableDiffusionTeacher) and teacher.xl else None
    asked = settings.sdxl_uncond
    if asked is None or asked == own:
        return replace(settings, sdxl_uncond=own), teacher, own
    if own is None:
        raise UserError(
            f"sdxl_uncond: {asked} is for Stable Diffusion XL, and teacher {teacher.spec.name!r} is another model",
            "leave it away",
        )
    other = copy.copy(teacher)
    assert isinstance(other, StableDiffusionTeacher)
    other.sdxl_uncond = asked
    return settings, other, own


def _begun(folder: SharedFolder, new: JsonObject, out: str | Path, uncond: str | None) -> JsonObject:
    """The manifest that holds in the folder, which is begun if it is empty. `uncond`: what the teacher takes for no
    prompt by itself, as it did for older stores, which do not say so. UserError: another store is there."""
    manifest = folder.open(new)
    check_manifest(manifest, f"{folder.url}/{MANIFEST}")
    there, asked = manifest["settings"]["n"], new["settings"]["n"]
    said = {**manifest, "settings": {"sdxl_uncond": uncond, **manifest["settings"]}}
    if different := differences(said, with_n(new, there)):
        hint = "choose another --out, or the settings it was made with"
        raise UserError(f"{out} is a pair store with other settings:\n  " + "\n  ".join(different), hint)
    if there != asked and manifest["settings"].get("rewire", "none") != "none":
        raise UserError(f"{out}: {REWIRED}; it has {there:,}, not {asked:,}", "choose another --out")
    check_probe(manifest, out)
    return manifest


def grow(folder: SharedFolder, n: int) -> JsonObject:
    """Let the store have at least n pairs; returns its manifest."""
    return folder.change(lambda manifest: with_n(manifest, max(n, manifest["settings"]["n"])))


def _complete(folder: SharedFolder) -> Callable[[JsonObject], bool]:
    return lambda manifest: not folder.left(PairSettings.from_manifest(manifest).units())


def _begun_shard(folder: SharedFolder, manifest: JsonObject, unit: Unit) -> dict[str, Tensor]:
    """The tensors of the unit's shard from when the store was smaller; none if there is no such shard, or it is not as
    it was written."""
    entry = folder.recorded().get(unit.file)
    if entry is None or entry["n"] >= unit.n:
        return {}
    before = replace(unit, n=entry["n"])
    try:
        tensors, record = read_shard(folder, manifest, before, entry)
    except UserError:
        return {}
    return tensors if record == shard_record(manifest, before) else {}


def check_asked(settings: PairSettings, spec: Spec) -> None:
    """UserError: labels or prompts that a teacher of that `spec` does not take, or no prompts for one that does."""
    if spec.condition != "text":
        if settings.prompts is not None:
            raise UserError(
                f"teacher {spec.name!r} takes no prompts (condition: {spec.condition})", "leave --prompts away"
            )
        label_mode(settings.labels, spec.classes, spec.name)
        return
    if settings.prompts is None:
        raise UserError(
            f"teacher {spec.name!r} is conditioned on text", "give --prompts FILE (.txt, one a line; .jsonl; .parquet)"
        )
    if settings.labels not in ("random", "none", "text"):
        raise UserError(f"teacher {spec.name!r} is conditioned on text; it takes no labels", "leave --labels away")


def _prompts(settings: PairSettings, teacher: Teacher, opened: Prompts | None) -> Prompts | None:
    """The prompts where the teacher takes text. UserError as `check_asked`."""
    check_asked(settings, teacher.spec)
    if settings.prompts is None:
        return None
    return opened if opened is not None else open_prompts(settings.prompts)


class _Timing:
    """How fast this worker is, for `d2o pairs --stats`: kept beside the store, and no part of what it holds."""

    def __init__(self, folder: SharedFolder, teacher: Teacher):
        self.folder, self.begun, self.pairs = folder, time.perf_counter(), 0
        device = torch.cuda.get_device_name(teacher.device) if teacher.device.type == "cuda" else teacher.device.type
        self.name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self.record = {
            "worker": f"{socket.gethostname()}-{os.getpid()}",
            "device": device,
            "threads": torch.get_num_threads(),
        }

    def add(self, unit: Unit) -> None:
        self.pairs += unit.n
        seconds = time.perf_counter() - self.begun
        self.folder.note(self.name, {**self.record, "pairs": self.pairs, "seconds": round(seconds, 3)})
