"""Sampling to a file: images of a student, or of a teacher from the same noise. Image i depends on seed + i (and its
label) alone.

The work is cut into chunks that any number of workers make in any order (`d2o.work`). They are kept as finished
parts in `OUT.parts` and joined at the end, so that OUT is there as a whole or not at all (a folder is filled in place,
and finished when it has samples.json).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2o.data.archive import Archive, Part, archive_for, join_pieces
from d2o.data.draws import check_range, draw, label_mode
from d2o.data.finished import Finished, take_over
from d2o.data.images import to_uint8
from d2o.data.pair_tools import ShardProgress
from d2o.data.prompts import Prompts
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import save_file, write_error
from d2o.networks.processor import AUTO, explain_precision
from d2o.runtime import Say, StopFlag, Stopped
from d2o.students.output_parts import discard_parts, finished, join_parts, parts_of, public, refuse_other
from d2o.students.sample_record import check_parts
from d2o.students.samplers import Sampler
from d2o.teachers.compute import BATCH, Compute, join_compute, torch_threads
from d2o.teachers.pair_maker import check_finite
from d2o.version import __version__
from d2o.work.folder import Ahead, Unit, Vanished, WorkFolder, cut, fill

CHUNK = 1024
ENCODE_BYTES = 2**20
"""Pixels that one thread encodes at a time."""


@dataclass(frozen=True)
class SampleSettings:
    """`n` images of seeds `seed` .. `seed + n - 1`; `labels` as `draws.label_mode` takes it."""

    n: int
    seed: int = 0
    labels: str | None = None


def make_samples(
    sampler: Sampler,
    out: str | Path,
    settings: SampleSettings,
    *,
    batch: int | None = None,
    threads: int | None = None,
    chunk: int | None = None,
    precision: str = "fp32",
    channels_last: bool | None = None,
    say: Say = lambda message: None,
    progress: ShardProgress = lambda done, total, note: None,
    stop: StopFlag | None = None,
) -> JsonObject:
    """Make, continue or add to `out` (no suffix: a folder; .zip, .tar, .npz), alone or beside other workers; returns
    its record (samples.json).

    A finished output of fewer images grows: it stays as it is until the larger one takes its place, with the bytes of
    one made at once. Workers that are asked for different numbers all go on to the largest. One that holds as many
    already is left alone.

    `batch` images per call (256), `threads` of torch, `chunk` images per part (1024, rounded up to whole batches),
    `precision` and `channels_last` (as `Compute` has them) hold for a new output; one that was begun keeps its own.
    Raises UserError: bad settings, something else at `out`, unwritable, an image that is not finite (named by its
    seed); Stopped: `stop` was set; finished parts are kept.
    """
    check_range(settings.n, settings.seed)
    out, archive = Path(out), archive_for(out)
    parts = parts_of(out)
    how = Compute(batch, threads, precision, channels_last)
    mine = new_record(sampler, settings, how, chunk)
    asked = [*how.asked, *(["chunk"] if chunk is not None else [])]
    while True:
        done = finished(archive, parts)
        if done is not None:
            refuse_other(done, mine, out, "choose another --out, or move it away")
            if (there := done["settings"]["n"]) >= settings.n:
                discard_parts(parts, there)
                already = (
                    f"all {there:,} images already"
                    if there == settings.n
                    else f"{there:,} images already, and so the first {settings.n:,}"
                )
                say(f"{out} holds {already}; nothing to do")
                return done
        try:
            return _work(sampler, archive, parts, done, mine, settings.n, how, asked, say, progress, stop)
        except Vanished:  # others have finished, and removed the parts
            if finished(archive, parts) == done:
                raise


def _work(
    sampler: Sampler,
    archive: Archive,
    parts: WorkFolder,
    done: JsonObject | None,
    mine: JsonObject,
    n: int,
    how: Compute,
    asked: list[str],
    say: Say,
    progress: ShardProgress,
    stop: StopFlag | None,
) -> JsonObject:
    """Make the parts that are missing, and join them. `done`: the record of the smaller output that is there."""
    out = archive.out
    compute = (
        mine["compute"]
        if done is None
        else {**done["compute"], "chunk": chunk_of(mine["compute"]["chunk"], done["compute"]["batch"])}
    )
    begun = mine if done is None else {**done, "settings": {**done["settings"], "n": n}, "compute": compute}
    record = check_parts(
        parts.open({"format": parts.kind, "version": 1, "record": begun, "parts": []}).get("record"), str(parts.path)
    )
    if finished(archive, parts) != done:  # others have finished, and removed their parts, before we opened ours
        raise Vanished(f"{parts.path} has vanished")
    refuse_other(record, mine, out, f"choose another --out, or remove {parts.path} to begin again")
    with parts.locked("join"):  # while nobody takes its number of images for the last word
        record = parts.change(lambda manifest: _of_size(manifest, max(n, manifest["record"]["settings"]["n"])))[
            "record"
        ]
    if (size := record["settings"]["n"]) > n or done is not None:
        say(f"{out} grows to {size:,} images" + (", as another command has asked" if size > n else ""))
    compute = join_compute(record["compute"], mine["compute"], str(out), say, asked)
    if how.precision == AUTO:
        say(explain_precision(compute.get("precision", "fp32"), sampler.device))
    sampler.tune(compute)
    # Images of its last batch were made beside fewer others, with other last bits: they are made again.
    whole = (
        0
        if done is None or done["compute"] != public(record)["compute"]
        else done["settings"]["n"] // compute["batch"] * compute["batch"]
    )
    old = take_over(archive, whole) if whole else None

    with torch_threads(compute["threads"]), ThreadPoolExecutor(min(8, os.cpu_count() or 1), "encode") as encoders:
        shown = 0

        def make(unit: Unit, before: int) -> list[Future[Part]] | None:
            nonlocal shown
            taken = None if old is None else _taken(sampler, old, record, unit)
            kept = 0 if taken is None else taken[0]
            encoded = [] if taken is None else [taken[1]]
            for start, images, labels in _images(sampler, record, unit.start + kept, unit.n - kept):
                encoded += _encode(encoders, archive, start, images, labels)
                made = start + len(images) - unit.start
                shown = before + made
                progress(shown, size, "")
                if stop and made < unit.n:
                    return None
            return encoded

        def write(unit: Unit, pieces: list[Future[Part]]) -> JsonObject:
            try:
                save_file(
                    parts.path / unit.file,
                    join_pieces([piece.result() for piece in pieces]),
                    {"start": unit.start, "n": unit.n},
                )
            except OSError as error:
                raise write_error(out, error) from error
            return {
                "file": unit.file,
                "start": unit.start,
                "n": unit.n,
                "bytes": (parts.path / unit.file).stat().st_size,
            }

        while True:
            size = record["settings"]["n"]
            units = cut(size, compute["chunk"], "part-{:05d}.safetensors")
            if not fill(parts, units, make, write, stop):
                kept = size - sum(unit.n for unit in parts.left(units))
                number = stop.received if stop is not None else 0
                raise Stopped(
                    f"stopped with {kept:,} of {size:,} images; run the same command again to continue {out}", number
                )
            with parts.locked("join"):
                record = parts.present()["record"]
                if record["settings"]["n"] == size:
                    join_parts(archive, parts, units, record)
                    discard_parts(parts, size)
                    break
    if shown < size:  # others made the rest
        progress(size, size, "")
    return public(record)


def _taken(sampler: Sampler, old: Finished, record: JsonObject, unit: Unit) -> tuple[int, Future[Part]] | None:
    """How many of the unit's images the finished output holds, and these; None for none, or if they are damaged
    there."""
    settings, count = record["settings"], min(unit.n, old.n - unit.start)
    if count < 1:
        return None
    labels = draw(settings["seed"], unit.start, count, sampler.spec.shape, sampler.spec.classes, settings["labels"])[1]
    found: Future[Part] = Future()
    try:
        found.set_result(old.part(unit.start, count, labels) | ({} if labels is None else {"label": labels}))
    except Exception:  # a damaged archive may raise anything; they are made again
        return None
    return count, found


def _of_size(manifest: JsonObject, n: int) -> JsonObject:
    """The manifest of the parts of n images."""
    record = manifest["record"]
    return {**manifest, "record": {**record, "settings": {**record["settings"], "n": n}}}


def first_images(sampler: Sampler, record: JsonObject, n: int) -> tuple[Tensor, Tensor | None]:
    """The first n images of the output with that record, made again: uint8 [n, C, H, W] and their labels."""
    batch = record["compute"]["batch"]
    count = min(-(-n // batch) * batch, record["settings"]["n"])  # whole batches, as they were, for the same last bits
    sampler.tune(record["compute"])
    with torch_threads(record["compute"]["threads"]):
        made = list(_images(sampler, record, 0, count))
    images = torch.cat([images for _, images, _ in made])[:n]
    labels = [labels for _, _, labels in made if labels is not None]
    return images, torch.cat(labels)[:n] if labels else None


def new_record(sampler: Sampler, settings: SampleSettings, how: Compute, chunk: int | None) -> JsonObject:
    """What an output says about itself (and `chunk`, which it does not: it has no influence)."""
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk must be at least 1, not {chunk}")
    compute = how.describe(how.batch or BATCH, sampler.device, sampler.network)  # whatever n is: it may grow
    if sampler.prompts is None:
        labels = label_mode(settings.labels, sampler.spec.classes, sampler.spec.name)
    else:
        labels = _prompt_numbers(settings.labels or "balanced", sampler.prompts, sampler.spec.name)
    return {
        "format": "d2o-samples",
        "version": 1,
        "d2o": __version__,
        "settings": {**asdict(settings), "labels": labels},
        "source": sampler.record,
        "compute": {**compute, "chunk": chunk_of(chunk or CHUNK, compute["batch"])},
    }


def _prompt_numbers(labels: str, prompts: Prompts, name: str) -> str:
    """`--labels` of what takes prompts: by their numbers, which prompts the images take in turn."""
    try:
        return label_mode(labels, len(prompts), name)
    except UserError as error:
        last = len(prompts) - 1
        hint = f"--labels says which prompts are taken, by number: 0 to {last}" if last else "leave --labels away"
        raise UserError(f"labels {labels!r}: {name!r} takes prompts, and no class labels", hint) from error


def chunk_of(chunk: int, batch: int) -> int:
    """Images per part: whole batches."""
    return -(-chunk // batch) * batch


def _images(sampler: Sampler, record: JsonObject, start: int, n: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(number of the first, uint8 [k, C, H, W], labels) in batches cut at multiples of the batch size."""
    settings, batch = record["settings"], record["compute"]["batch"]
    cuts = [(first, min(batch, start + n - first)) for first in range(start, start + n, batch)]
    drawn = Ahead(
        lambda cut: draw(settings["seed"], *cut, sampler.spec.shape, sampler.spec.classes, settings["labels"]), cuts
    )
    for (first, _), (noise, labels) in zip(cuts, drawn, strict=True):
        with torch.inference_mode():
            x = sampler.call(noise, sampler.condition(labels, len(noise)))
            check_finite(x, settings["seed"] + first, f"the {record['source']['kind']}")
            images = to_uint8(x).cpu()
        yield first, images, labels


def _encode(
    encoders: ThreadPoolExecutor, archive: Archive, start: int, images: Tensor, labels: Tensor | None
) -> list[Future[Part]]:
    """Begin to encode, in pieces that keep several threads busy when images are large."""

    def encode(first: int, images: Tensor, labels: Tensor | None) -> Part:
        return archive.encode(first, images, labels) | ({} if labels is None else {"label": labels})

    size = max(1, ENCODE_BYTES // images[0].numel())
    cuts = range(0, len(images), size)
    return [
        encoders.submit(encode, start + i, images[i : i + size], None if labels is None else labels[i : i + size])
        for i in cuts
    ]
