"""Every file-system event of a command, by number: to list them, to die at one of them, or to find the disk full from
one of them on.

Events are what changes files: opening to write, each write(2) of Python's own files, fsync, rename, removal, folders.
Audit hooks see most of them, from whatever library; writes and fsync are seen by taking the place of `open` and
`os.fsync`. Dying at a write leaves half of it.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {
    "os.rename": 1,
    "os.remove": 0,
    "os.mkdir": 0,
    "os.rmdir": 0,
    "os.link": 1,
    "os.symlink": 1,
    "os.truncate": 0,
    "os.chmod": 0,
}
"""Audit event -> which of its arguments names the file that changes."""
FILLING = ("open", "write", "os.mkdir", "fsync")
"""What fails on a full disk; renaming and removing do not."""


class Events:
    """Install in a child, once. `at`: the number (from 1) of the event at which `action` happens; 0: never."""

    def __init__(self, root: Path, at: int = 0, action: str = "kill", where: Callable[[str, str], bool] | None = None):
        self.root, self.at, self.action, self.where = str(root), at, action, where
        self.seen: list[tuple[str, str]] = []
        self.full = False
        self.lock = threading.RLock()

    def install(self) -> None:
        sys.addaudithook(self._audit)
        fsync, plain = os.fsync, builtins.open

        def watched_fsync(descriptor: int) -> None:
            self.event("fsync", "")
            fsync(descriptor)

        def watched_open(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: Any = None,
            errors: Any = None,
            newline: Any = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if (
                not set(mode) & set("wax+")
                or not isinstance(file, (str, bytes, os.PathLike))
                or self._ours(file) is None
            ):
                return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = _Raw(self, file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            binary = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            if "b" in mode:
                return binary
            return io.TextIOWrapper(binary, encoding or "utf-8", errors, newline, line_buffering=buffering == 1)

        os.fsync = watched_fsync
        io.open = builtins.open = watched_open

    def event(self, kind: str, path: str, before: Callable[[], None] = lambda: None) -> None:
        """`before` is done if this is where the process dies or the disk gets full: a part of a write."""
        with self.lock:
            counted = (
                ".tfevents." not in path
            )  # TensorBoard writes in a thread of its own: the numbers would not be the same twice
            if counted:
                self.seen.append((kind, path))
            here = (counted and len(self.seen) == self.at) or (self.where is not None and self.where(kind, path))
            if here and self.action == "kill":
                before()
                os.kill(os.getpid(), signal.SIGKILL)
            if here and self.action == "full":
                self.full = True
                if kind in FILLING:
                    before()
            if self.full and kind in FILLING:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path or None)

    def save(self, path: Path) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(handle, json.dumps(self.seen).encode())
        os.close(handle)

    def _audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            path, mode, flags = arguments
            if not (set(mode) & set("wax+") if isinstance(mode, str) else (flags or 0) & WRITING):
                return
        elif name in PATHS:
            path = arguments[PATHS[name]]
            if (name == "os.mkdir" and os.path.isdir(path)) or (
                name == "os.remove" and arguments[1] == -1 and not os.path.lexists(path)
            ):
                return  # nothing changes
        else:
            return
        relative = self._ours(path)
        if relative is not None:
            self.event(name, relative)

    def _ours(self, path: Any) -> str | None:
        """The path within the trial's folder, or None. Names relative to an open folder count as ours: only trees of
        ours are removed."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        text = os.path.join(self.root, os.fsdecode(path))
        text = os.path.normpath(text)
        return text[len(self.root) + 1 :] if text.startswith(self.root + os.sep) else None


class _Raw(io.FileIO):
    """A file whose writes are events."""

    def __init__(self, events: Events, file: Any, mode: str, closefd: bool, opener: Any):
        super().__init__(file, mode, closefd, opener)
        self.events, self.relative = events, events._ours(file) or ""

    def write(self, data: Any) -> int:  # type: ignore[override]
        half = memoryview(data).cast("B")[: max(len(memoryview(data).cast("B")) // 2, 0)]
        plain = super().write
        self.events.event("write", self.relative, lambda: plain(half) and None)
        return plain(data)
