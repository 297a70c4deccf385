"""What a folder that any number of processes fill together can do, wherever it lies: on a disk (`WorkFolder` in
d2o/work/folder.py) or on an object store (`RemoteFolder` in d2o/work/remote.py).

`manifest.json` lists the finished files, and names the sha256 of its own content; `timing/` holds statistics of the
workers, on which nothing depends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.runtime import trusting

MANIFEST, TIMING = "manifest.json", "timing"
SHA256 = "sha256"
"""Key of a manifest's digest of its own content."""
POLL = 0.1
"""Seconds between two looks at what other workers are doing."""


@dataclass(frozen=True)
class Unit:
    """One file of the folder: samples `start` to `start + n - 1`."""

    file: str
    start: int
    n: int


def cut(n: int, size: int, pattern: str) -> list[Unit]:
    """n samples in units of `size` (the last one shorter); `pattern` formats the unit's number."""
    return [Unit(pattern.format(i), start, min(size, n - start)) for i, start in enumerate(range(0, n, size))]


class Vanished(UserError):
    """The folder was removed while it was worked on."""


class Claim(Protocol):
    """The right to make a file, until it is released or its holder dies."""

    def release(self) -> None: ...


class SharedFolder(ABC):
    """`kind` is the manifest's "format", `entries` the manifest's key that lists finished files ({"file", "start", "n",
    "bytes", ...}); `url` names the folder in messages; `poll` is the pause in seconds between two looks at what other
    workers are doing.
    """

    poll = POLL

    def __init__(self, url: str, kind: str, entries: str):
        self.url, self.kind, self.entries = url, kind, entries

    @abstractmethod
    def manifest(self) -> JsonObject | None:
        """The manifest, or None when there is none. UserError: damaged, of another format, or from a newer d2o."""

    @abstractmethod
    def open(self, record: JsonObject) -> JsonObject:
        """Begin the folder with `record` as its manifest, or join it; returns the manifest that holds.

        UserError: foreign files, unwritable.
        """

    @abstractmethod
    def add(self, entry: JsonObject) -> None:
        """Record a finished file (in place of an earlier record of the same file)."""

    @abstractmethod
    def change(self, how: Callable[[JsonObject], JsonObject]) -> JsonObject:
        """Replace the manifest that holds by `how(it)`, and return that; nothing is written where they are equal."""

    @abstractmethod
    def claim(self, name: str) -> Claim | None:
        """The claim of a file, held until `.release()` or the death of this process; None when another worker holds
        it."""

    @abstractmethod
    def remove_temporary(self, name: str) -> None:
        """Remove what a killed worker left of the file `name`; only for the holder of its claim."""

    @abstractmethod
    def close(self, finished: Callable[[JsonObject], bool] = lambda manifest: True) -> None:
        """All is finished: remove what only working together needed, unless the manifest that now holds says
        otherwise."""

    @abstractmethod
    def save(self, file: str, tensors: dict[str, Tensor], meta: JsonObject) -> JsonObject:
        """Write a safetensors file, whole or not at all; returns {"bytes", "sha256"} of it. UserError: unwritable, disk
        full."""

    @abstractmethod
    def local(self, file: str) -> Path:
        """A path on this machine with the file's content. (That of a missing file of a local folder does not exist.)

        UserError: it cannot be fetched, or what came is not what the manifest says.
        """

    @abstractmethod
    def sha256(self, file: str) -> str:
        """Hex digest of the file as it lies there now, read in full. UserError: it is missing or cannot be read."""

    @abstractmethod
    def sizes(self, files: Iterable[str]) -> dict[str, int]:
        """Bytes of each file; -1 for a missing one."""

    @abstractmethod
    def note(self, name: str, record: JsonObject) -> None:
        """Leave `timing/<name>.json`, or not if that fails: for statistics only."""

    @abstractmethod
    def notes(self) -> list[JsonObject]:
        """What `note` left, in the order of the names; damaged ones are left out."""

    def size(self, file: str) -> int:
        """Bytes of the file; -1 when it is missing."""
        return self.sizes([file])[file]

    def exists(self, file: str) -> bool:
        return self.size(file) >= 0

    def recorded(self) -> dict[str, JsonObject]:
        """The manifest's entries by file name. Vanished: there is no manifest any more."""
        return {entry["file"]: entry for entry in self.present()[self.entries]}

    def left(self, units: Iterable[Unit]) -> list[Unit]:
        """The units that are not recorded (or only with fewer samples), or whose file is missing or cut short."""
        recorded, units = self.recorded(), list(units)
        sizes = self.sizes(unit.file for unit in units if unit.file in recorded)
        return [
            u
            for u in units
            if u.file not in recorded or recorded[u.file]["n"] < u.n or sizes[u.file] != recorded[u.file]["bytes"]
        ]

    def order(self, units: list[Unit]) -> list[Unit]:
        """The order in which this worker should try to claim the units, if nothing speaks for another: give them to
        `fill` so."""
        return units

    @contextlib.contextmanager
    def locked(self, name: str = "manifest") -> Iterator[None]:
        """Wait for a claim of the folder, and hold it in the block."""
        while (lock := self.claim(name)) is None:
            time.sleep(self.poll / 10)
        try:
            yield
        finally:
            lock.release()

    def present(self) -> JsonObject:
        """The manifest. Vanished: there is none any more."""
        manifest = self.manifest()
        if manifest is None:
            raise Vanished(f"{self.url}/{MANIFEST} has vanished", "was the folder removed meanwhile?")
        return manifest

    def parse(self, data: bytes) -> JsonObject:
        """The manifest in these bytes. UserError: not one of this kind, or not as it was written."""
        where = f"{self.url}/{MANIFEST}"
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is damaged: it is not JSON ({error})", "move it away, or choose another folder"
            ) from error
        if (
            not isinstance(record, dict)
            or record.get("format") != self.kind
            or not isinstance(record.get(self.entries), list)
        ):
            raise UserError(f"{where} does not belong to a {self.kind} folder", "choose another folder")
        if record.get("version") != 1:
            raise UserError(
                f"{where} has version {record.get('version')}; this d2o reads version 1", "use the d2o that made it"
            )
        if not intact(record):
            hint = "move it away and make the folder again; `d2o --trust ...` reads it without looking at digests"
            raise UserError(f"{where} is damaged: its content is not what was written (sha256)", hint)
        if wrong := next((entry for entry in record[self.entries] if not _is_entry(entry)), None):
            raise UserError(
                f"{where} is damaged: {self.entries} holds {json.dumps(wrong)[:80]}, which names no finished file"
            )
        return {key: value for key, value in record.items() if key != SHA256}

    def _refuse(self, foreign: Iterable[str]) -> None:
        """UserError if there are such files, since the folder has no manifest that speaks for them."""
        if names := sorted(foreign):
            what = f"{self.url} holds files that are not of a {self.kind} folder ({', '.join(names[:3])})"
            raise UserError(what, "choose an empty or new folder")


def dump_manifest(manifest: JsonObject) -> str:
    """A manifest as it is written, with its digest: equal content gives equal bytes."""
    return json.dumps({**manifest, SHA256: content_sha256(manifest)}, indent=1, sort_keys=True) + "\n"


def content_sha256(record: JsonObject) -> str:
    """Hex digest of a JSON record, however it is written; its own entry for the digest aside."""
    rest = {key: value for key, value in record.items() if key != SHA256}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def intact(record: JsonObject) -> bool:
    """Whether a record's content is that of its digest. Those of an older d2o have none; with `--trust` nobody
    looks."""
    return SHA256 not in record or trusting() or record[SHA256] == content_sha256(record)


def _is_entry(entry: object) -> bool:
    """Whether this may be a manifest's line for a finished file."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        return False
    return all(
        type(entry.get(key)) is int and entry[key] >= least for key, least in (("start", 0), ("n", 1), ("bytes", 0))
    )


def note_file(name: str) -> str:
    return f"{TIMING}/{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}.json"


def read_notes(contents: Iterable[bytes]) -> list[JsonObject]:
    """The notes among these; what is not JSON is left out."""
    found = []
    for data in contents:
        with contextlib.suppress(ValueError):
            found.append(json.loads(data))
    return [note for note in found if isinstance(note, dict)]
