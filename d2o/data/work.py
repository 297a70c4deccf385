"""A folder that any number of processes fill together without talking to each other: pair shards, parts of a sample archive.

`manifest.json` lists the finished files. A file is claimed by locking `.locks/<file>.lock`; the kernel frees the lock of a killed process,
so its file is taken over. Every write of the manifest happens under `.locks/manifest.lock` and is atomic. When all is done, `.locks` goes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from d2o.errors import UserError
from d2o.interop.safetensors_io import atomic_write, write_error
from d2o.runtime import StopFlag

MANIFEST, LOCKS = "manifest.json", ".locks"
POLL = 0.1
"""Seconds between two looks at what other workers are doing."""
BEHIND = 2
"""Finished units that may wait for the disk: this bounds the memory."""

A = TypeVar("A")
B = TypeVar("B")
Payload = TypeVar("Payload")


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


class WorkFolder:
    """`kind` is the manifest's "format", `entries` the manifest's key that lists finished files ({"file", "start", "n", "bytes", ...})."""

    def __init__(self, path: str | Path, kind: str, entries: str):
        self.path, self.kind, self.entries = Path(path), kind, entries

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None when there is none. UserError: damaged, of another format, or from a newer d2o."""
        path = self.path / MANIFEST
        try:
            record = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged: it is not JSON ({error})", "move it away, or choose another folder") from error
        if not isinstance(record, dict) or record.get("format") != self.kind or not isinstance(record.get(self.entries), list):
            raise UserError(f"{path} does not belong to a {self.kind} folder", "choose another folder")
        if record.get("version") != 1:
            raise UserError(f"{path} has version {record.get('version')}; this d2o reads version 1", "use the d2o that made it")
        return record

    def open(self, record: dict[str, Any]) -> dict[str, Any]:
        """Begin the folder with `record` as its manifest, or join it; returns the manifest that holds.

        UserError: foreign files, unwritable.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; expected a folder", "choose another --out")
        if self.path.is_dir():
            # Listed before the manifest is looked for: a worker that starts beside us writes the manifest before any other file.
            foreign = sorted(p.name for p in self.path.iterdir() if p.name != LOCKS and not _is_temporary(p, MANIFEST))
            if self.manifest() is None and foreign:
                names = ", ".join(foreign[:3])
                raise UserError(f"{self.path} holds files that are not of a {self.kind} folder ({names})", "choose an empty or new folder")
        with self.locked():
            if (manifest := self.manifest()) is None:
                manifest = json.loads(json.dumps(record))  # as it will be read
                self._write(manifest)
        return manifest

    def add(self, entry: dict[str, Any]) -> None:
        """Record a finished file (in place of an earlier record of the same file)."""
        with self.locked():
            manifest = self._present()
            others = [e for e in manifest[self.entries] if e["file"] != entry["file"]]
            manifest[self.entries] = sorted([*others, entry], key=lambda e: e["start"])
            self._write(manifest)

    def recorded(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries by file name. Vanished: there is no manifest any more."""
        return {entry["file"]: entry for entry in self._present()[self.entries]}

    def left(self, units: Iterable[Unit]) -> list[Unit]:
        """The units that are not recorded, or whose file is missing or cut short."""
        recorded = self.recorded()
        return [u for u in units if u.file not in recorded or _size(self.path / u.file) != recorded[u.file]["bytes"]]

    def claim(self, name: str) -> FileLock | None:
        """The lock of a file, held until `.release()` or the death of this process; None when another worker holds it."""
        # Not thread-local: the thread that writes the file releases the lock that the computing thread took.
        lock = FileLock(self.path / LOCKS / f"{name}.lock", thread_local=False)
        try:
            (self.path / LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):  # not found: a worker that finished has removed .locks this very moment
            return None
        except OSError as error:
            raise write_error(self.path, error) from error
        return lock

    @contextlib.contextmanager
    def locked(self, name: str = "manifest") -> Iterator[None]:
        """Wait for a lock of the folder, and hold it in the block."""
        while (lock := self.claim(name)) is None:
            time.sleep(POLL / 10)
        try:
            yield
        finally:
            lock.release()

    def remove_temporary(self, name: str) -> None:
        """Remove what a killed worker left of the file `name`; only for the holder of its lock."""
        for path in self.path.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """All is finished: remove the locks."""
        if (self.path / LOCKS).exists():
            with self.locked():
                self.remove_temporary(MANIFEST)
                shutil.rmtree(self.path / LOCKS, ignore_errors=True)

    def _present(self) -> dict[str, Any]:
        manifest = self.manifest()
        if manifest is None:
            raise Vanished(f"{self.path / MANIFEST} has vanished", "was the folder removed meanwhile?")
        return manifest

    def _write(self, manifest: dict[str, Any]) -> None:
        atomic_write(self.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def fill(
    folder: WorkFolder,
    units: list[Unit],
    make: Callable[[Unit, int], Payload | None],
    write: Callable[[Unit, Payload], dict[str, Any]],
    stop: StopFlag | None = None,
    adopt: Callable[[Unit], dict[str, Any] | None] = lambda unit: None,
) -> bool:
    """Make every unit that nobody has made or is making: True when all are finished, False when `stop` was set (what was begun is written).

    `make(unit, done)` runs here and gives what to write, or None when it saw `stop`; `done` counts the samples that exist so far.
    `write(unit, payload)` runs in a second thread, at most `BEHIND` units behind, and returns the manifest's entry.
    `adopt(unit)` returns the entry of a unit whose file is complete but was not recorded (its worker was killed in between), or None.
    """
    writing: deque[tuple[Unit, Future[None]]] = deque()

    def store(unit: Unit, payload: Payload, lock: FileLock) -> None:
        try:
            folder.add(write(unit, payload))
        finally:
            lock.release()

    def begin(unit: Unit, lock: FileLock) -> bool:
        """Make or adopt the unit; True when its lock went on to the writer."""
        if not folder.left([unit]):  # finished by another worker since we looked
            return False
        folder.remove_temporary(unit.file)
        if (entry := adopt(unit)) is not None:
            folder.add(entry)
            return False
        sizes = {file: entry["n"] for file, entry in folder.recorded().items()} | {u.file: u.n for u, _ in writing}
        payload = make(unit, sum(sizes.values()) - sizes.get(unit.file, 0))
        if payload is None:
            return False
        writing.append((unit, writer.submit(store, unit, payload, lock)))
        return True

    with ThreadPoolExecutor(1, "writer") as writer:
        while left := folder.left(units):
            claimed = False
            for unit in left:
                if stop:
                    break
                if (lock := folder.claim(unit.file)) is None:
                    continue
                claimed, handed_on = True, False
                try:
                    handed_on = begin(unit, lock)
                finally:
                    if not handed_on:
                        lock.release()
                while writing and (len(writing) > BEHIND or writing[0][1].done()):
                    writing.popleft()[1].result()
            while writing:
                writing.popleft()[1].result()
            if stop:
                return not folder.left(units)
            if not claimed:
                time.sleep(POLL)  # what is left is in other workers' hands
    return True


def ahead(function: Callable[[A], B], arguments: Iterable[A]) -> Iterator[B]:
    """function(argument) for each in order; the next one is computed in a thread while the caller uses the present one."""
    with ThreadPoolExecutor(1, "ahead") as executor:
        waiting: Future[B] | None = None
        for argument in arguments:
            following = executor.submit(function, argument)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _is_temporary(path: Path, name: str) -> bool:
    return path.name.startswith(f".{name}.") and path.name.endswith(".tmp")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
