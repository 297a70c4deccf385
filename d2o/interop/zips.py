"""The directory of a zip, held against what its end says of it: zipfile believes each entry's own lengths, and one that
is too long swallows those after it without a word."""

from __future__ import annotations

import os
import struct
import zipfile

TAIL = 2**16 + 22 + 76
"""Bytes that the records at a zip's end take at most: its comment, the end record, and those of zip64."""


def zip_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members. zipfile.BadZipFile: the directory lists more or fewer than the zip's end says."""
    file, members = archive.fp, archive.infolist()
    assert file is not None
    place = file.tell()
    file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
    tail = file.read()
    file.seek(place)
    end = tail.rfind(b"PK\5\6")
    number = struct.unpack_from("<H", tail, end + 10)[0] if 0 <= end <= len(tail) - 22 else len(members)
    if number == 0xFFFF and (end64 := tail.rfind(b"PK\6\6", 0, end)) >= 0:
        number = struct.unpack_from("<Q", tail, end64 + 32)[0]
    if not all(info.filename for info in members):
        raise zipfile.BadZipFile("a member has no name")
    if number != len(members):
        raise zipfile.BadZipFile(
            f"its end says that it has {number:,} members, and its directory lists {len(members):,}"
        )
    return members
