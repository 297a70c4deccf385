"""Folders, zips and tars as lists of members whose bytes can be read by many threads at once. Nothing is ever
extracted."""

from __future__ import annotations

import bz2
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
from collections.abc import Callable
from typing import IO, Any, NamedTuple, Protocol

from d2o.errors import UserError
from d2o.inputs import MAX_IMAGE_BYTES, MAX_RATIO, UNPACKED_FREELY, check_input, special_kind
from d2o.interop.zips import zip_members

_PREAD = hasattr(os, "pread")  # not on Windows


class Decompressor(Protocol):
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


_UNPACKERS: dict[int, Callable[[], Decompressor]] = {
    zipfile.ZIP_DEFLATED: lambda: zlib.decompressobj(-15),
    zipfile.ZIP_BZIP2: bz2.BZ2Decompressor,
}
"""What unpacks a member to a given length and no further. Not LZMA's: it takes the memory that the file asks for."""


class ArchiveMember(NamedTuple):
    name: str  # what reports show and what is sorted: the path, behind its shard's name where there are several
    path: str  # "/"-separated, inside the container
    size: int  # bytes, uncompressed
    where: Any  # what the container needs to read it


class Container:
    """`members`: files only, in no particular order. `bad`: (name, why) of those that cannot be read at all. `path`:
    where it lies."""

    members: list[ArchiveMember]

    def __init__(self, path: str) -> None:
        self.path, self.members = path, []
        self.bad: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def read(self, member: ArchiveMember, limit: int | None = None, most: int = MAX_IMAGE_BYTES) -> bytes:
        """The member's bytes, checked; with a limit about that many of the first ones, unchecked. OSError if they
        cannot be had, or if it says that it has more than `most`."""
        if member.size > most:
            raise OSError(f"it says that it has {member.size:,} bytes; the limit is {most:,}")
        return self._read(member, limit)

    def place(self, member: ArchiveMember) -> str:
        """The member, for messages."""
        return f"{member.name} in {self.path}"

    def _read(self, member: ArchiveMember, limit: int | None) -> bytes:
        raise NotImplementedError


class FolderContainer(Container):
    def __init__(self, path: str):
        super().__init__(path)
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
                    self.members.append(ArchiveMember(name, name, about.st_size, entry.path))
                else:
                    self.bad.append((name, f"{special_kind(about.st_mode)}, not a regular file"))
        if not found and prefix:
            self.empty.append(prefix.rstrip("/"))

    def _read(self, member: ArchiveMember, limit: int | None) -> bytes:
        with open(member.where, "rb") as file:
            size = min(os.fstat(file.fileno()).st_size, MAX_IMAGE_BYTES)  # it may have changed since it was listed
            return file.read(size if limit is None else min(limit, size))


class ZipContainer(Container):
    def __init__(self, path: str):
        super().__init__(path)
        try:
            with zipfile.ZipFile(path) as archive:
                members = zip_members(archive)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise UserError(
                f"{path} is not a readable zip: {error}", "it may be cut off: compare its size with the original's"
            ) from error
        self._file = SharedFile(open(path, "rb"))  # noqa: SIM115  # closed by it
        last: dict[str, zipfile.ZipInfo] = {}
        for info in members:
            name = printable(info.filename.replace("\\", "/"))
            if info.is_dir():
                continue
            if name in last:
                self.bad.append((name, "a second member of this name (the last one counts)"))
            last[name] = info
        self.members = [ArchiveMember(name, name, info.file_size, info) for name, info in last.items()]

    def _read(self, member: ArchiveMember, limit: int | None) -> bytes:
        info: zipfile.ZipInfo = member.where
        if info.flag_bits & 1:
            raise OSError("encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, *_UNPACKERS):
            raise OSError("packed by a method that is not read; deflate is")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise OSError("broken zip: a stored member of two sizes")
        header = self._file.read(info.header_offset, 30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise OSError("broken zip: no such member at its place")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        data = self._file.read(begin, info.compress_size if limit is None else min(limit, info.compress_size))
        try:
            if info.compress_type != zipfile.ZIP_STORED:
                data = _UNPACKERS[info.compress_type]().decompress(data, limit or info.file_size + 1)
        except (zlib.error, OSError, ValueError) as error:
            raise OSError(f"broken zip: {error}") from error
        if limit is None and (len(data) != info.file_size or zlib.crc32(data) != info.CRC):
            raise OSError("broken zip: the checksum differs")
        return data


class TarContainer(Container):
    """One tar or several shards, plain or gzipped. A gzipped one is unpacked once into an unnamed temporary file."""

    def __init__(self, shards: list[tuple[str, str]]):
        """`shards`: (name, path); names stand before those of their members where there are several."""
        super().__init__(shards[0][1] if len(shards) == 1 else os.path.dirname(shards[0][1]))
        for name, path in shards:
            self._index(name, path, f"{name}/" if len(shards) > 1 else "")

    def _index(self, shard: str, path: str, prefix: str) -> None:
        file = self._plain(shard, path)
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        shared = SharedFile(file)
        try:
            archive = tarfile.TarFile(fileobj=file)
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{path} is not a readable tar: {error}", "it may be cut off: compare its size with the original's"
            ) from error
        last: dict[str, ArchiveMember] = {}
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
            last[inside] = ArchiveMember(prefix + inside, inside, info.size, (shared, info.offset_data))
        self.members.extend(last.values())

    def _plain(self, shard: str, path: str) -> IO[bytes]:
        try:
            file: IO[bytes] = open(path, "rb")  # noqa: SIM115  # closed by its SharedFile
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}") from error
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not gzipped:
            return file
        plain = tempfile.TemporaryFile()  # noqa: SIM115  # likewise
        size, packed_size = 0, check_input(path)
        with file, gzip.GzipFile(fileobj=file) as packed:
            while True:
                try:
                    block = packed.read1(1 << 20)  # read() would keep nothing of the last block
                except (EOFError, OSError, zlib.error) as error:
                    self.bad.append((shard, f"the archive is broken or cut off: {error}"))
                    break
                if not block:
                    break
                size += len(block)
                if size > max(UNPACKED_FREELY, MAX_RATIO * packed_size):
                    plain.close()
                    most = f"the limit is {max(UNPACKED_FREELY, MAX_RATIO * packed_size):,}"
                    raise UserError(
                        f"{path} would unpack from {packed_size:,} to more than {size:,} bytes; {most}",
                        "gunzip it first if it is right",
                    )
                try:
                    plain.write(block)
                except OSError as error:
                    raise UserError(
                        f"no room to unpack {path} in {tempfile.gettempdir()}: {error.strerror}", "gunzip it first"
                    ) from error
        plain.flush()
        return plain

    def _check_tail(self, shard: str, file: SharedFile, begin: int, length: int) -> None:
        """tarfile stops silently at the first thing that is no header: what follows must be zeros."""
        if begin >= length:
            self.notes.append(f"{shard} has no end mark: it may be cut off")
        for place in range(begin, length, 1 << 20):
            block = file.read(place, 1 << 20)
            if block.count(0) != len(block):
                self.bad.append(
                    (shard, f"something that is not a tar member at byte {begin}: what follows is not read")
                )
                return

    def _read(self, member: ArchiveMember, limit: int | None) -> bytes:
        file, begin = member.where
        wanted = member.size if limit is None else min(limit, member.size)
        data: bytes = file.read(begin, wanted)
        if len(data) < wanted:
            raise OSError("the archive is cut off inside this file")
        return data


class SharedFile:
    """One open file, read at any place by any thread (and by forked processes)."""

    def __init__(self, file: IO[bytes]):
        self._file, self._lock, self._size = file, threading.Lock(), os.fstat(file.fileno()).st_size
        weakref.finalize(self, file.close)

    def read(self, begin: int, count: int) -> bytes:
        """`count` bytes, or as many as the file has there: places and lengths come from the archive, which may lie."""
        begin, count = min(begin, self._size), max(0, min(count, self._size - begin))
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
