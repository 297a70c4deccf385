"""What can be done with pair stores besides making and reading them: check them, count them, join them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from d2o.data.pair_files import noise_sha256, open_store, shard_record, store_folder, unit_noise
from d2o.data.pair_reading import first_not_finite, misfit, read_shard
from d2o.data.pair_settings import PairSettings, differences
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import load_file
from d2o.work.base import SharedFolder
from d2o.work.folder import Unit

ShardProgress = Callable[[int, int, str], None]


def verify_store(path: str | Path, progress: ShardProgress | None = None) -> list[str]:
    """Read everything and compare it with the manifest's checksums. Returns one line per problem, beginning with the
    shard's name.

    UserError: no store there, or its manifest is damaged.
    """
    folder, manifest, settings = open_store(path)
    problems = []
    recorded, done = folder.recorded(), 0
    for unit in settings.units():
        entry = recorded.get(unit.file)
        problem = "not made yet" if entry is None else _problem(folder, manifest, unit, entry)
        if problem:
            problems.append(f"{unit.file}: {problem}")
        done += unit.n
        if progress is not None:
            progress(done, settings.n, "")
    return problems


def _problem(folder: SharedFolder, manifest: JsonObject, unit: Unit, entry: JsonObject) -> str | None:
    size = folder.size(unit.file)
    if size < 0:
        return "missing"
    if entry["n"] < unit.n:
        return f"{entry['n']} of its {unit.n} pairs are made so far"
    if size != entry["bytes"]:
        return f"{size} bytes instead of {entry['bytes']}"
    if folder.sha256(unit.file) != entry["sha256"]:
        return "its checksum differs from the manifest's"
    tensors = load_file(folder.local(unit.file))[0]
    if why := misfit(manifest, tensors, unit):
        return why
    if (row := first_not_finite(tensors)) is not None:
        return f"pair {unit.start + row} holds values that are not finite (NaN or infinite)"
    if not manifest["settings"]["store_noise"] and noise_sha256(unit_noise(manifest, unit)) != entry["noise_sha256"]:
        return (
            "its noise, derived from the seeds here, differs from the one it was made from (another torch or processor)"
        )
    return None


def stats(path: str | Path) -> JsonObject:
    """What a store, finished or not, holds and took: pairs, bytes, network evaluations, speed by worker, and how its
    conditions are covered.

    "seconds" and "pairs_per_s" count making and writing, all workers together; they come from `timing/`, which is not
    part of the store.
    """
    folder, manifest, settings = open_store(path)
    recorded = folder.recorded()
    units = [
        replace(unit, n=min(unit.n, recorded[unit.file]["n"])) for unit in settings.units() if unit.file in recorded
    ]
    pairs, notes = sum(unit.n for unit in units), folder.notes()
    timed, seconds = sum(note["pairs"] for note in notes), sum(note["seconds"] for note in notes)
    size = sum(recorded[unit.file]["bytes"] for unit in units)
    report: JsonObject = {
        "pairs": pairs,
        "of": settings.n,
        "shards": len(units),
        "bytes": size,
        "bytes_per_pair": size / pairs if pairs else None,
        "nfe_per_pair": settings.nfe,
        "forwards_per_pair": settings.forwards,
        "nfe": pairs * settings.nfe,
        "forwards": pairs * settings.forwards,
        "workers": notes,
        "seconds": round(seconds, 3),
        "timed_pairs": timed,
        "pairs_per_s": round(timed / seconds, 3) if seconds else None,
    }
    if "prompts" in manifest:
        count = manifest["prompts"]["count"]
        times = np.zeros(count, dtype=np.int64)
        for unit in units:
            np.add.at(times, settings.prompt_numbers(unit.start, unit.n, count), 1)
        report["prompts"] = {
            "used": int((times > 0).sum()),
            "of": count,
            "least": int(times.min()),
            "most": int(times.max()),
        }
    elif settings.labels != "none":
        classes = np.zeros(manifest["spec"]["classes"], dtype=np.int64)
        for unit in units:
            classes += np.bincount(
                read_shard(folder, manifest, unit, recorded[unit.file])[0]["label"].numpy(), minlength=len(classes)
            )
        report["labels"] = {
            "used": int((classes > 0).sum()),
            "of": len(classes),
            "least": int(classes.min()),
            "most": int(classes.max()),
        }
    return report


def merge_stores(sources: Sequence[str | Path], out: str | Path, progress: ShardProgress | None = None) -> int:
    """Join stores into a new one; returns its number of pairs.

    Either parts of one store, made with equal settings (each worker's own share on a machine of its own), or finished
    stores that differ in their seeds alone and follow each other: seeds 0 .. 999 and 1000 .. 1999. The sources stay.
    UserError: anything else, told by name; shards that are missing from all parts; shards that two parts hold with
    different content.
    """
    if len(sources) < 2:
        raise UserError(
            "merging takes at least two stores", "for example: d2o pairs --merge part1/ --merge part2/ --out whole/"
        )
    stores = [open_store(path) for path in sources]
    if {settings.seed for _, _, settings in stores} == {stores[0][2].seed}:
        manifest, moves = _same(sources, stores)
    else:
        manifest, moves = _following(sources, stores)
    manifests = {folder.url: theirs for folder, theirs, _ in stores}
    target = store_folder(out)
    found = target.open({**manifest, "shards": []})
    if different := differences(found, manifest):
        raise UserError(
            f"{out} is a pair store with other settings:\n  " + "\n  ".join(different), "choose another --out"
        )
    settings, done = PairSettings.from_manifest(found), 0
    units = settings.units()
    for unit, (folder, theirs, entry) in zip(units, moves, strict=True):
        if target.left([unit]):
            tensors, meta = read_shard(folder, manifests[folder.url], theirs, entry)
            record = shard_record(found, unit)
            if meta != {**record, "seed": meta.get("seed"), "start": meta.get("start")}:
                raise UserError(
                    f"{folder.url}/{theirs.file} was made in another way than its store says",
                    "d2o pairs --verify names such shards",
                )
            saved = target.save(unit.file, tensors, record)
            target.add(
                {"file": unit.file, "start": unit.start, "n": unit.n, **saved, "noise_sha256": entry["noise_sha256"]}
            )
        done += unit.n
        if progress is not None:
            progress(done, settings.n, "")
    target.close()
    return settings.n


Opened = tuple[SharedFolder, JsonObject, PairSettings]
Move = tuple[SharedFolder, Unit, JsonObject]


def _same(paths: Sequence[str | Path], stores: Sequence[Opened]) -> tuple[JsonObject, list[Move]]:
    """The manifest of the whole, and for each of its shards where it lies."""
    _, manifest, settings = stores[0]
    for path, (_, theirs, _) in zip(paths[1:], stores[1:]):
        _agree(paths[0], manifest, path, theirs)
    found: dict[str, tuple[SharedFolder, JsonObject]] = {}
    for folder, _, _ in stores:
        for name, entry in folder.recorded().items():
            other = found.setdefault(name, (folder, entry))
            if other[1]["sha256"] != entry["sha256"]:
                raise UserError(
                    f"{name} is not the same in {other[0].url} and {folder.url}",
                    "made on different hardware? Keep one of them",
                )
    units = settings.units()
    if absent := [unit.file for unit in units if unit.file not in found]:
        raise UserError(
            f"{len(absent)} of {len(units)} shards are in none of the stores: {', '.join(absent[:3])}",
            "make them first",
        )
    return manifest, [(found[unit.file][0], unit, found[unit.file][1]) for unit in units]


def _following(paths: Sequence[str | Path], stores: Sequence[Opened]) -> tuple[JsonObject, list[Move]]:
    order = sorted(range(len(stores)), key=lambda i: stores[i][2].seed)
    paths, stores = [paths[i] for i in order], [stores[i] for i in order]
    _, manifest, first = stores[0]
    moves: list[Move] = []
    total = 0
    for i, (path, (folder, theirs, settings)) in enumerate(zip(paths, stores)):
        if settings.seed != first.seed + total:
            raise UserError(
                f"{path} has seeds from {settings.seed}, but {paths[i - 1]} ends before {first.seed + total}",
                "stores to be joined must follow each other without a gap",
            )
        if settings.labels not in ("none", "random") or settings.rewire != "none":
            raise UserError(
                f"{path}: only stores with random labels (or none), not rewired, can be joined one after the other",
                "in others, what pair i holds depends on where the store begins",
            )
        if i < len(stores) - 1 and settings.n % settings.shard_size:
            raise UserError(
                f"{path}: its {settings.n} pairs end within a shard of {settings.shard_size}, so no other store can"
                " follow it"
            )
        _agree(
            paths[0], manifest, path, {**theirs, "settings": {**theirs["settings"], "seed": first.seed, "n": first.n}}
        )
        if left := folder.left(settings.units()):
            raise UserError(
                f"{path} is not finished: {len(left)} shards are missing", f"continue it: {settings.command(path)}"
            )
        recorded = folder.recorded()
        moves += [(folder, unit, recorded[unit.file]) for unit in settings.units()]
        total += settings.n
    whole = replace(first, n=total)
    return {**manifest, "settings": {**whole.to_dict(), "labels": first.labels}}, moves


def _agree(path: str | Path, manifest: JsonObject, other: str | Path, theirs: JsonObject) -> None:
    different = differences(manifest, theirs)
    for name in sorted({*manifest["compute"], *theirs["compute"]} - {"torch", "processor"}):
        if manifest["compute"].get(name) != theirs["compute"].get(name):
            different.append(f"{name}: {manifest['compute'].get(name)} -> {theirs['compute'].get(name)}")
    if different:
        raise UserError(
            f"{path} and {other} were made with different settings:\n  " + "\n  ".join(different),
            "only like can be joined with like",
        )
