"""LMDB, one key per image, as LSUN is published: values are image files (LSUN's are WebP or JPEG), or the bytes of
square RGB images.

The file is read without LMDB itself (see lmdb_pages.py).
"""

from __future__ import annotations

import math
import mmap
import os

from d2o.data.containers import ArchiveMember, Container, SharedFile, printable
from d2o.data.lmdb_pages import Damaged, key_places
from d2o.errors import UserError
from d2o.inputs import check_input

# First bytes of a file, and the suffix that it would have.
_STARTS = {b"RIFF": ".webp", b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp"}


def is_lmdb(path: str) -> bool:
    """A folder with data.mdb, or that file."""
    return os.path.isfile(os.path.join(path, "data.mdb")) or (path.endswith(".mdb") and os.path.isfile(path))


class LmdbFiles(Container):
    """Members are called by their keys, in which order LMDB keeps them, with the suffix of what they are."""

    def __init__(self, path: str):
        super().__init__(path)
        file = os.path.join(path, "data.mdb") if os.path.isdir(path) else path
        size = check_input(file, "an LMDB")
        try:
            if not size:
                raise Damaged("it is empty")
            self._file = SharedFile(open(file, "rb"))  # noqa: SIM115  # closed by it
            with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for key, begin, count in key_places(data):
                    name = printable(key.decode("utf-8", "backslashreplace")) + _suffix(data[begin : begin + 4], count)
                    self.members.append(ArchiveMember(name, name, count, begin))
        except (Damaged, OSError) as error:
            raise UserError(
                f"{path} is not a readable LMDB: {error}", "it may be cut off: compare its size with the original's"
            ) from error

    def _read(self, member: ArchiveMember, limit: int | None) -> bytes:
        data = self._file.read(member.where, member.size if limit is None else min(limit, member.size))
        if not member.name.endswith(".ppm"):
            return data
        side = _side(member.size)
        return f"P6 {side} {side} 255\n".encode() + data


def _suffix(start: bytes, size: int) -> str:
    found = next((suffix for magic, suffix in _STARTS.items() if start.startswith(magic)), "")
    return found or (".ppm" if _side(size) else "")


def _side(size: int) -> int:
    """Height and width of a square RGB image of so many bytes; 0 if there is none of at least 8 pixels."""
    side = math.isqrt(size // 3)
    return side if side >= 8 and 3 * side * side == size else 0
