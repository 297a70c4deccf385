"""Where the passes of an evaluation are kept until its results are written.

In d2o's own folder a pass goes when nobody needs it any more. Every process that uses one holds a lock in it (freed by
the kernel, however the process ends), and signs off when its results are written; the last to leave removes the folder,
as one step. So no kill, and no full disk while results are written, costs the work, and what is left is always a pass
that can be taken up again.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d2o.errors import UserError
from d2o.evaluation.collect import Pass, Tick, collect
from d2o.evaluation.columns import KIND, Columns, begin
from d2o.inputs import JsonObject
from d2o.interop.discard import discard
from d2o.interop.temporary import sweep
from d2o.runtime import Say, StopFlag, Stopped, worker
from d2o.work.folder import LOCKS, MANIFEST, Claim, WorkFolder

OLD = 14 * 86400
"""Seconds after which an unfinished pass in d2o's own folder is taken to be forgotten."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    file: str
    start: int = Field(ge=0)
    n: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: str
    version: int
    record: JsonObject
    parts: list[_Entry]


class Workplace:
    """`folder`: passes stay there and are found again by later evaluations; None: d2o's own folder, from which they go
    when the block ends without an exception (the results are written by then). With `memory` nothing is written. `say`
    is told what was found damaged.

    UserError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path | None = None,
        memory: bool = False,
        stop: StopFlag | None = None,
        say: Say = lambda message: None,
    ):
        from d2o.interop.download import home

        self.root = None if memory else folder or home() / "eval"
        self.kept, self.stop, self.say = folder is not None, stop, say
        self.user = f"user-{os.getpid()}-{secrets.token_hex(4)}"
        self.used: dict[Path, Claim] = {}
        if self.root is not None:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.root}: {error.strerror or error}",
                    "name a folder for unfinished work with --work",
                ) from error
            if not self.kept:
                _tidy(self.root)

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for path, lock in self.used.items():
            self._leave(path, lock, done=kind is None)
        self.used = {}

    def collect(self, work: Pass, progress: Tick) -> Columns:
        """The pass, made, continued or shared. Errors as `collect`; UserError: a damaged folder that is not d2o's
        own."""
        self.check_stop(work.title)
        if self.root is not None:
            self._join(self.root / work.fingerprint[:24], work)
        return collect(work, self.root, progress, self.stop, self.say)

    def check_stop(self, title: str) -> None:
        """Stopped, where that was asked for between two passes."""
        if self.stop:
            raise Stopped(f"stopped at {title}; run the same command again to continue", self.stop.received)

    def _join(self, path: Path, work: Pass) -> None:
        """Begin or join the folder of a pass; what is there and is no pass makes way for a new one."""
        if (why := _damage(path, work.record)) is not None:
            if self.kept:
                raise UserError(f"{path} is damaged: {why}", "remove it; its images are measured again")
            self.say(f"{path} was damaged ({why}); its images are measured again")
            discard(path)
        while not self.kept and path not in self.used:
            folder = begin(path, work.record)
            with folder.locked():
                if (
                    folder.manifest() is None or (lock := folder.claim(self.user)) is None
                ):  # the last user left meanwhile
                    continue
                self.used[path] = lock
                _signature(path, worker()[0]).unlink(missing_ok=True)  # of an evaluation that was killed

    def _leave(self, path: Path, lock: Claim, done: bool) -> None:
        """Sign off where all is `done`; the last one removes the pass."""
        folder, (rank, workers) = WorkFolder(path, KIND, "parts"), worker()
        with contextlib.suppress(OSError, UserError), folder.locked():
            lock.release()
            (path / LOCKS / f"{self.user}.lock").unlink(missing_ok=True)
            if done:
                _signature(path, rank).touch()
                if all(_signature(path, other).exists() for other in range(workers)) and not _living(path):
                    discard(path)


def _signature(path: Path, rank: int) -> Path:
    return path / LOCKS / f"done-{rank}"


def _living(path: Path) -> bool:
    """Whether a process uses the pass."""
    for file in (path / LOCKS).glob("user-*.lock"):
        try:
            with FileLock(file, timeout=0):
                pass
        except Timeout:
            return True
    return False


def _damage(path: Path, record: JsonObject) -> str | None:
    """What is wrong with a folder that should hold the pass of this record; None: it is one, or not begun."""
    parts = any(
        path.glob("part-*.safetensors")
    )  # looked for first: a worker that starts beside us writes the manifest before them
    try:
        manifest = WorkFolder(path, KIND, "parts").parse((path / MANIFEST).read_bytes())
        _Manifest.model_validate(manifest)
    except FileNotFoundError:
        return f"it has no {MANIFEST}" if parts else None
    except OSError:
        return None  # said where it is opened
    except (UserError, ValidationError):
        return f"{MANIFEST} is not one of an evaluation"
    if manifest["record"] != json.loads(json.dumps(record)):
        return f"{MANIFEST} is of another evaluation"
    return None


def _tidy(root: Path) -> None:
    """Remove what was half removed, and passes that were killed long ago and never taken up again."""
    sweep(root)
    for path in root.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > OLD and not _living(path):
                discard(path)
