"""Temporary files and folders that their writer keeps locked while it lives, so that anybody can tell, and remove, what
a killed one left.

They lie beside what they will become, as `.<name>.<random>.tmp`. The lock (flock) is the kernel's: it ends with the
process, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".tmp"


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, locked until the block ends; removed then if it still has its name. OSError as the
    system gives it."""
    with _locked(path, folder=False) as temporary:
        yield temporary


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, locked until the block ends; removed then, with its content, if it still has its
    name."""
    with _locked(path, folder=True) as temporary:
        yield temporary


def sweep(folder: str | os.PathLike, name: str = "*") -> int:
    """Remove what killed writers of `folder/<name>` (a glob pattern) left; a living writer's is left alone. Returns how
    many went."""
    gone = 0
    for path in Path(folder).glob(f".{name}.*{SUFFIX}"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
                _remove(path)
                gone += 1
            finally:
                os.close(handle)
    return gone


@contextlib.contextmanager
def _locked(path: Path, folder: bool) -> Iterator[Path]:
    while True:
        if folder:
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX))
            handle = os.open(temporary, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX)
            temporary = Path(name)
        with contextlib.suppress(OSError):  # a file system without locks: nobody can lock it, so nobody sweeps there
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _names(temporary, handle):
            break
        os.close(handle)  # swept between its creation and our lock
    try:
        yield temporary
    finally:
        _remove(temporary)
        os.close(handle)


def _names(path: Path, handle: int) -> bool:
    """Whether the path is still that of the open file."""
    try:
        there, ours = os.stat(path, follow_symlinks=False), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
