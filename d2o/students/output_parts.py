"""What lies where samples are written to: the finished output, and the parts that become it (`OUT.parts`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from d2o.data.archive import RECORD, Archive, Part, check_free
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import load_file, write_error
from d2o.students.sample_record import check_parts, check_samples
from d2o.work.folder import Unit, WorkFolder


def parts_of(out: Path) -> WorkFolder:
    return WorkFolder(out.with_name(out.name + ".parts"), "d2o-sample-parts", "parts")


def join_parts(archive: Archive, parts: WorkFolder, units: list[Unit], record: JsonObject) -> None:
    def load() -> Iterator[Part]:
        return (load_file(parts.path / unit.file)[0] for unit in units)

    labels = None if record["settings"]["labels"] == "none" else torch.cat([part["label"] for part in load()])
    target, final = parts.path / "joined", archive.out / RECORD if archive.in_place else archive.out
    try:
        archive.join(target, load, labels, record["settings"]["n"], public(record))
        with open(target, "rb") as file:
            os.fsync(file.fileno())
        os.replace(target, final)
    except OSError as error:
        raise write_error(archive.out, error) from error


def finished(archive: Archive, parts: WorkFolder) -> JsonObject | None:
    """The record of the finished output; None if there is none. UserError: something else is in its place."""
    try:
        record = check_free(archive)
    except UserError:
        # A folder without a record: others may be filling it, or have finished since we looked. In this order: the
        # first worker writes the parts' manifest before the first image, and the record before the parts go.
        if archive.in_place and parts.manifest() is not None and not (archive.out / RECORD).exists():
            return None
        record = check_free(archive)
    return None if record is None else check_samples(record, str(archive.out))


def public(record: JsonObject) -> JsonObject:
    return {**record, "compute": {name: value for name, value in record["compute"].items() if name != "chunk"}}


def refuse_other(old: JsonObject, new: JsonObject, out: Path, hint: str) -> None:
    """UserError when the output is of other settings or another network, naming each difference."""
    was, now = ({**record["source"], **record["settings"]} for record in (old, new))
    said = ("checkpoint", "licence", "nfe", "forwards", "options", "n")  # by others, or of no consequence
    names = [name for name in [*now, *was] if name not in said] if was["kind"] == now["kind"] else ["kind"]
    different = [
        f"{name}: {was.get(name)} -> {now.get(name)}" for name in dict.fromkeys(names) if was.get(name) != now.get(name)
    ]
    if different:
        raise UserError(f"{out} holds samples of other settings:\n  " + "\n  ".join(different), hint)


def discard_parts(parts: WorkFolder, n: int) -> None:
    """Remove the parts of a finished output of n images, but not those of a larger one that is being made. Renamed
    first, so that no worker meets half of them."""
    manifest = parts.manifest()
    if manifest is not None and check_parts(manifest.get("record"), str(parts.path))["settings"]["n"] > n:
        return
    gone = parts.path.with_name(parts.path.name + ".done")
    shutil.rmtree(gone, ignore_errors=True)
    if parts.path.is_dir() and (manifest is not None or {p.name for p in parts.path.iterdir()} <= {".locks"}):
        try:
            os.replace(parts.path, gone)
        except FileNotFoundError:
            return  # another worker did it
        shutil.rmtree(gone, ignore_errors=True)
