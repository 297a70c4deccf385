"""LMDB, one key per image, as LSUN is published: values are image files (LSUN's are WebP or JPEG), or the bytes of square RGB images.

Needs the package `lmdb`, the extra `lsun`: nothing else in d2o does.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from typing import Any

from d2o.data.containers import Container, Member, printable
from d2o.errors import UserError

# First bytes of a file, and the suffix that it would have.
_STARTS = {b"RIFF": ".webp", b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp"}


def is_lmdb(path: str) -> bool:
    """A folder with data.mdb, or that file."""
    return os.path.isfile(os.path.join(path, "data.mdb")) or (path.endswith(".mdb") and os.path.isfile(path))


class LmdbFiles(Container):
    """Members are called by their keys, in which order LMDB keeps them, with the suffix of what they are."""

    def __init__(self, path: str):
        super().__init__()
        # Absolute, and the same for all spellings: LMDB must not be opened twice in a process.
        self._path = os.path.realpath(os.path.dirname(path) if os.path.basename(path) == "data.mdb" else path)
        try:
            with _environment(self._path, os.getpid()).begin(buffers=True) as transaction:
                for key, value in transaction.cursor():
                    name = printable(bytes(key).decode("utf-8", "backslashreplace")) + _suffix(value)
                    self.members.append(Member(name, name, len(value), bytes(key)))
        except _error() as error:
            raise UserError(f"{path} is not a readable LMDB: {error}", "it may be cut off: compare its size with the original's") from error

    def _read(self, member: Member, limit: int | None) -> bytes:
        # A transaction belongs to one thread, and an environment to one process.
        try:
            with _environment(self._path, os.getpid()).begin(buffers=True) as transaction:
                value = transaction.get(member.where)
                if value is None:
                    raise OSError("it was there when the set was opened, and is not now")
                head = b""
                if member.name.endswith(".ppm"):
                    side = _side(len(value))
                    head = f"P6 {side} {side} 255\n".encode()
                return head + bytes(value if limit is None else value[:limit])
        except _error() as error:
            raise OSError(f"broken LMDB: {error}") from error


def _suffix(value: Any) -> str:
    start = bytes(value[:4])
    found = next((suffix for magic, suffix in _STARTS.items() if start.startswith(magic)), "")
    return found or (".ppm" if _side(len(value)) else "")


def _side(size: int) -> int:
    """Height and width of a square RGB image of so many bytes; 0 if there is none of at least 8 pixels."""
    side = math.isqrt(size // 3)
    return side if side >= 8 and 3 * side * side == size else 0


def _lmdb(path: str = "") -> Any:
    try:
        return importlib.import_module("lmdb")
    except ImportError as error:
        raise UserError(f"{path} is an LMDB; reading it takes the package lmdb, which is not installed", "pip install 'd2o[lsun]'") from error


def _error() -> type[Exception]:
    return _lmdb().Error  # type: ignore[no-any-return]


@functools.cache
def _environment(path: str, process: int) -> Any:
    """Opened for reading, without a lock file: the folder may be one that nobody can write to."""
    return _lmdb(path).open(path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False, create=False)
