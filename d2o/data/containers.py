"""Folders, zips and tars as lists of members whose bytes can be read by many threads at once. Nothing is ever extracted."""

from __future__ import annotations

import gzip
import os
import posixpath
import stat
import struct
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from typing import IO, Any, NamedTuple

from d2o.errors import UserError

MAX_MEMBER_BYTES = 1 << 30  # a larger "image" is a mistake or an attack
_PREAD = hasattr(os, "pread")  # not on Windows


class Member(NamedTuple):
    name: str  # what reports show and what is sorted: the path, behind its shard's name where there are several
    path: str  # "/"-separated, inside the container
    size: int  # bytes, uncompressed
    where: Any  # what the container needs to read it


class Container:
    """`members`: files only, in no particular order. `bad`: (name, why) of those that cannot be read at all."""

    members: list[Member]

    def __init__(self) -> None:
        self.members = []
        self.bad: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def read(self, member: Member, limit: int | None = None) -> bytes:
        """The member's bytes, checked; with a limit about that many of the first ones, unchecked. OSError if they cannot be had."""
        if member.size > MAX_MEMBER_BYTES:
            raise OSError(f"{member.size} bytes are too many for one image")
        return self._read(member, limit)

    def _read(self, member: Member, limit: int | None) -> bytes:
        raise NotImplementedError


class Folder(Container):
    def __init__(self, path: str):
        super().__init__()
        self.empty: list[str] = []
        try:
            about = os.stat(path)
            self._walk(path, "", frozenset({(about.st_dev, about.st_ino)}))
        except OSError as error:
            raise UserError(f"cannot list {error.filename!r}: {error.strerror}") from error
        if self.empty:
            self.notes.append(f"sub-folders without a file ignored: {_few(self.empty)}")

    def _walk(self, folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        found = 0
        with os.scandir(folder) as entries:
            for entry in entries:
                found += 1
                name = prefix + printable(entry.name)
                try:
                    about = os.stat(entry.path)  # follows links; entry.stat() has no inode on Windows
                except OSError as error:
                    self.bad.append((name, f"cannot be opened: {error.strerror}"))
                    continue
                if stat.S_ISDIR(about.st_mode):
                    me = (about.st_dev, about.st_ino)
                    if me in above:
                        self.notes.append(f"{name!r} links to a folder above it: not followed")
                    else:
                        self._walk(entry.path, name + "/", above | {me})
                elif stat.S_ISREG(about.st_mode):
                    self.members.append(Member(name, name, about.st_size, entry.path))
                else:
                    self.bad.append((name, "not a regular file"))
        if not found and prefix:
            self.empty.append(prefix.rstrip("/"))

    def _read(self, member: Member, limit: int | None) -> bytes:
        with open(member.where, "rb") as file:
            return file.read(-1 if limit is None else limit)


class Zip(Container):
    def __init__(self, path: str):
        super().__init__()
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise UserError(f"{path} is not a readable zip: {error}", "it may be cut off: compare its size with the original's") from error
        self.path = path
        self._file = _SharedFile(open(path, "rb"))  # noqa: SIM115  # closed by it
        last: dict[str, zipfile.ZipInfo] = {}
        for info in members:
            name = printable(info.filename.replace("\\", "/"))
            if info.is_dir():
                continue
            if name in last:
                self.bad.append((name, "a second member of this name (the last one counts)"))
            last[name] = info
        self.members = [Member(name, name, info.file_size, info) for name, info in last.items()]

    def _read(self, member: Member, limit: int | None) -> bytes:
        info: zipfile.ZipInfo = member.where
        if info.flag_bits & 1:
            raise OSError("encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return self._read_rare(info)
        header = self._file.read(info.header_offset, 30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise OSError("broken zip: no such member at its place")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        data = self._file.read(begin, info.compress_size if limit is None else min(limit, info.compress_size))
        try:
            if info.compress_type == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-15).decompress(data, limit or info.file_size + 1)
        except zlib.error as error:
            raise OSError(f"broken zip: {error}") from error
        if limit is None and (len(data) != info.file_size or zlib.crc32(data) != info.CRC):
            raise OSError("broken zip: the checksum differs")
        return data

    def _read_rare(self, info: zipfile.ZipInfo) -> bytes:  # bzip2, lzma: nobody packs images so, and zipfile can do it
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as file:
                return file.read(info.file_size + 1)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error) as error:
            raise OSError(f"broken zip: {error}") from error


class Tar(Container):
    """One tar or several shards, plain or gzipped. A gzipped one is unpacked once into an unnamed temporary file."""

    def __init__(self, shards: list[tuple[str, str]]):
        """`shards`: (name, path); names stand before those of their members where there are several."""
        super().__init__()
        for name, path in shards:
            self._index(name, path, f"{name}/" if len(shards) > 1 else "")

    def _index(self, shard: str, path: str, prefix: str) -> None:
        file = self._plain(shard, path)
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        shared = _SharedFile(file)
        try:
            archive = tarfile.TarFile(fileobj=file)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} is not a readable tar: {error}", "it may be cut off: compare its size with the original's") from error
        last: dict[str, Member] = {}
        while True:
            try:
                info = archive.next()
            except (tarfile.TarError, OSError, ValueError) as error:
                self.bad.append((shard, f"the archive is broken or cut off after {len(last)} members: {error}"))
                break
            if info is None:
                self._check_tail(shard, shared, archive.offset, length)
                break
            archive.members = []  # type: ignore[attr-defined]  # or it remembers them all, a kilobyte each
            inside = printable(posixpath.normpath(info.name).lstrip("/"))
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                self.bad.append((prefix + inside, "not a regular file"))
                continue
            if inside in last:
                self.bad.append((prefix + inside, "a second member of this name (the last one counts)"))
            last[inside] = Member(prefix + inside, inside, info.size, (shared, info.offset_data))
        self.members.extend(last.values())

    def _plain(self, shard: str, path: str) -> IO[bytes]:
        try:
            file: IO[bytes] = open(path, "rb")  # noqa: SIM115  # closed by its _SharedFile
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}") from error
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not gzipped:
            return file
        plain = tempfile.TemporaryFile()  # noqa: SIM115  # likewise
        with file, gzip.GzipFile(fileobj=file) as packed:
            while True:
                try:
                    block = packed.read1(1 << 20)  # read() would keep nothing of the last block
                except (EOFError, OSError, zlib.error) as error:
                    self.bad.append((shard, f"the archive is broken or cut off: {error}"))
                    break
                if not block:
                    break
                try:
                    plain.write(block)
                except OSError as error:
                    raise UserError(f"no room to unpack {path} in {tempfile.gettempdir()}: {error.strerror}", "gunzip it first") from error
        plain.flush()
        return plain

    def _check_tail(self, shard: str, file: _SharedFile, begin: int, length: int) -> None:
        """tarfile stops silently at the first thing that is no header: what follows must be zeros."""
        if begin >= length:
            self.notes.append(f"{shard} has no end mark: it may be cut off")
        for place in range(begin, length, 1 << 20):
            block = file.read(place, 1 << 20)
            if block.count(0) != len(block):
                self.bad.append((shard, f"something that is not a tar member at byte {begin}: what follows is not read"))
                return

    def _read(self, member: Member, limit: int | None) -> bytes:
        file, begin = member.where
        wanted = member.size if limit is None else min(limit, member.size)
        data: bytes = file.read(begin, wanted)
        if len(data) < wanted:
            raise OSError("the archive is cut off inside this file")
        return data


class _SharedFile:
    """One open file, read at any place by any thread (and by forked processes)."""

    def __init__(self, file: IO[bytes]):
        self._file, self._lock = file, threading.Lock()
        weakref.finalize(self, file.close)

    def read(self, begin: int, count: int) -> bytes:
        if _PREAD:
            return os.pread(self._file.fileno(), count, begin)
        with self._lock:
            self._file.seek(begin)
            return self._file.read(count)


def printable(name: str) -> str:
    """Names that are no valid UTF-8 must still fit into messages and hashes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _few(names: list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
