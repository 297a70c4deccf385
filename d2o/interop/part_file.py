"""`NAME.part`: a file of which the first bytes have come, and the note that says of which file they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from d2o.errors import UserError
from d2o.inputs import MAX_JSON_BYTES, JsonObject, parse_json
from d2o.interop.safetensors_io import atomic_write, write_error

CHUNK = 1 << 20
"""Bytes read from files at once."""


class PartFile:
    """`NAME.part`: the first `position` bytes of the file, with their running sha256.

    `validator` is the server's strong ETag (else its Last-Modified), without which bytes of two requests are never
    joined. `known`: the file's sha256 is, so that nobody needs to guess from its first bytes whether it is the right
    one.
    """

    def __init__(self, path: Path, url: str, known: bool = False):
        self.known = known
        self.path, self.target, self.url = path.with_name(path.name + ".part"), path, url
        self.note = path.with_name(path.name + ".part.json")
        self.file: BinaryIO | None = None
        self.position, self.digest = 0, hashlib.sha256()
        self.validator: str | None = None
        self.total: int | None = None

    def __enter__(self) -> PartFile:
        note = read_object(self.note) or {}
        try:
            if note.get("url") == self.url and note.get("validator") and self.path.is_file():
                self.file = open(self.path, "r+b", buffering=0)
                self.position = feed(self.digest, self.file)
                self.validator, self.total = note["validator"], note.get("total")
            else:
                self.begin(None, None)
        except OSError as error:
            raise self.write_error(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        if not self.position or self.validator is None:  # nothing that a later run could use
            self.discard()

    def begin(self, validator: str | None, total: int | None) -> None:
        """Throw away what is there and start with the file that `validator` names."""
        if self.file is not None:
            self.file.close()
        try:
            self.note.unlink(missing_ok=True)  # first, so that it never describes bytes of another file
            self.file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise self.write_error(error) from error
        self.position, self.digest = 0, hashlib.sha256()
        self.validator, self.total = validator, total
        if validator is not None:
            atomic_write(self.note, json.dumps({"url": self.url, "validator": validator, "total": total}) + "\n")

    def append(self, data: bytes) -> None:
        assert self.file is not None
        written = 0
        try:
            while written < len(data):
                written += self.file.write(memoryview(data)[written:])
        except OSError as error:
            raise self.write_error(error) from error
        self.position += len(data)
        self.digest.update(data)

    def room(self, needed: int) -> None:
        """UserError when the disk has no room for `needed` more bytes."""
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            message = f"cannot write {self.target}: {needed:,} more bytes are needed, and the disk has {free:,} free"
            raise UserError(message, "make room and run again, or set D2O_HOME to a folder on another disk")

    def write_error(self, error: OSError) -> UserError:
        hint = "make room and run again (what came so far is kept), or set D2O_HOME to another folder"
        return UserError(write_error(self.target, error).message, hint)

    def discard(self) -> None:
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Flush to the disk and take the whole file's name."""
        assert self.file is not None
        try:
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.path, self.target)
        except OSError as error:
            raise self.write_error(error) from error
        self.note.unlink(missing_ok=True)


def feed(digest: hashlib._Hash, file: BinaryIO) -> int:
    """Hash the rest of `file`; the number of bytes."""
    count = 0
    while data := file.read(CHUNK):
        digest.update(data)
        count += len(data)
    return count


def read_object(path: Path) -> JsonObject | None:
    """The JSON object in a file, or None: there is none."""
    try:
        record = parse_json(path.read_bytes()) if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES else None
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
