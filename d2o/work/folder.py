"""A folder on a disk that any number of processes fill together without talking to each other: pair shards, parts of a
sample archive.

`manifest.json` lists the finished files. A file is claimed by locking `.locks/<file>.lock`; the kernel frees the lock
of a killed process, so its file is taken over. Every write of the manifest happens under `.locks/manifest.lock` and is
atomic. When all is done, `.locks` goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from filelock import FileLock, Timeout
from torch import Tensor

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import atomic_write, file_sha256, to_bytes, write_error
from d2o.interop.temporary import sweep
from d2o.runtime import StopFlag
from d2o.work.base import (
    MANIFEST,
    POLL,
    TIMING,
    Claim,
    SharedFolder,
    Unit,
    Vanished,
    cut,
    dump_manifest,
    note_file,
    read_notes,
)

__all__ = ["MANIFEST", "POLL", "Claim", "SharedFolder", "Unit", "Vanished", "Ahead", "WorkFolder", "cut", "fill"]

LOCKS = ".locks"
BEHIND = 2
"""Finished units that may wait for the disk: this bounds the memory."""

A = TypeVar("A")
B = TypeVar("B")
Payload = TypeVar("Payload")


class WorkFolder(SharedFolder):
    """A folder on a disk that all workers see."""

    def __init__(self, path: str | Path, kind: str, entries: str):
        super().__init__(str(path), kind, entries)
        self.path = Path(path)

    def manifest(self) -> JsonObject | None:
        try:
            data = (self.path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"cannot read {self.path / MANIFEST}: {error.strerror or error}") from error
        return self.parse(data)

    def open(self, record: JsonObject) -> JsonObject:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; expected a folder", "choose another --out")
        if self.path.is_dir():
            # Listed before the manifest is looked for: a worker that starts beside us writes the manifest before any
            # other file.
            foreign = [
                p.name for p in self.path.iterdir() if p.name not in (LOCKS, TIMING) and not _is_temporary(p, MANIFEST)
            ]
            if self.manifest() is None:
                self._refuse(foreign)
        with self.locked():
            sweep(self.path)
            if (manifest := self.manifest()) is None:
                manifest = json.loads(json.dumps(record))  # as it will be read
                self._write(manifest)
        return manifest

    def add(self, entry: JsonObject) -> None:
        with self.locked():
            manifest = self.present()
            others = [e for e in manifest[self.entries] if e["file"] != entry["file"]]
            manifest[self.entries] = sorted([*others, entry], key=lambda e: e["start"])
            self._write(manifest)

    def change(self, how: Callable[[JsonObject], JsonObject]) -> JsonObject:
        with self.locked():
            before = self.present()
            after = how(before)
            if after != before:
                self._write(after)
        return after

    def claim(self, name: str) -> FileLock | None:
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

    def remove_temporary(self, name: str) -> None:
        sweep(self.path, name)

    def close(self, finished: Callable[[JsonObject], bool] = lambda manifest: True) -> None:
        if (self.path / LOCKS).exists():
            with self.locked():
                if finished(self.present()):
                    sweep(self.path)
                    shutil.rmtree(self.path / LOCKS, ignore_errors=True)

    def save(self, file: str, tensors: dict[str, Tensor], meta: JsonObject) -> JsonObject:
        data = to_bytes(tensors, meta)
        atomic_write(self.path / file, data)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def local(self, file: str) -> Path:
        return self.path / file

    def sha256(self, file: str) -> str:
        try:
            return file_sha256(self.path / file)
        except OSError as error:
            raise UserError(f"cannot read {self.path / file}: {error.strerror or error}") from error

    def sizes(self, files: Iterable[str]) -> dict[str, int]:
        return {file: _size(self.path / file) for file in files}

    def note(self, name: str, record: JsonObject) -> None:
        with contextlib.suppress(UserError):
            atomic_write(self.path / note_file(name), json.dumps(record, sort_keys=True) + "\n")

    def notes(self) -> list[JsonObject]:
        return read_notes(
            path.read_bytes() for path in sorted((self.path / TIMING).glob("*.json")) if not path.name.startswith(".")
        )

    def _write(self, manifest: JsonObject) -> None:
        atomic_write(self.path / MANIFEST, dump_manifest(manifest))


def fill(
    folder: SharedFolder,
    units: list[Unit],
    make: Callable[[Unit, int], Payload | None],
    write: Callable[[Unit, Payload], JsonObject],
    stop: StopFlag | None = None,
    adopt: Callable[[Unit], JsonObject | None] = lambda unit: None,
) -> bool:
    """Make every unit that nobody has made or is making: True when all are finished, False when `stop` was set (what
    was begun is written).

    `make(unit, done)` runs here and gives what to write, or None when it saw `stop`; `done` counts the samples that
    exist so far. `write(unit, payload)` runs in a second thread, at most `BEHIND` units behind, and returns the
    manifest's entry. `adopt(unit)` returns the entry of a unit whose file is complete but was not recorded (its worker
    was killed in between), or None.
    """
    writing: deque[tuple[Unit, Future[None]]] = deque()

    def store(unit: Unit, payload: Payload, lock: Claim) -> None:
        try:
            folder.add(write(unit, payload))
        finally:
            lock.release()

    def begin(unit: Unit, lock: Claim) -> bool:
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
                time.sleep(folder.poll)  # what is left is in other workers' hands
    return True


class Ahead(Iterator[B], Generic[A, B]):
    """function(argument) for each in order; the next `depth` are computed in a thread while the caller uses the present
    one.

    Depth 0 computes each one when it is asked for, without a thread. `close` waits for the thread's end. One that is
    only dropped does not wait: the garbage collector may come by in the middle of anything, such as the start of
    another thread, and waiting there can be for ever.
    """

    def __init__(self, function: Callable[[A], B], arguments: Iterable[A], depth: int = 1):
        self._function, self._arguments, self._depth = function, iter(arguments), depth
        self._executor = ThreadPoolExecutor(1, "ahead") if depth else None
        self._waiting: deque[Future[B]] = deque()

    def __next__(self) -> B:
        if self._executor is None:
            return self._function(next(self._arguments))
        try:
            while len(self._waiting) <= self._depth:
                self._waiting.append(self._executor.submit(self._function, next(self._arguments)))
        except StopIteration:
            pass
        try:
            if not self._waiting:
                raise StopIteration
            return self._waiting.popleft().result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the thread. There is nothing more to come."""
        self._arguments = iter(())
        while self._waiting:
            self._waiting.popleft().cancel()
        if self._executor is not None:
            self._executor.shutdown()
            self._executor, self._depth = None, 0


def _is_temporary(path: Path, name: str) -> bool:
    return path.name.startswith(f".{name}.") and path.name.endswith(".tmp")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
