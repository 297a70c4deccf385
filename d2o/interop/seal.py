"""The seal of a safetensors file that d2o wrote: its metadata names the file's size and the sha256 of all its bytes.

The record (see `safetensors_io`) holds `file_bytes` and `file_sha256`, written with a fixed number of characters. The
digest is that of the whole file with 64 zeros in the digest's own place, so that no byte is left out: not the header's
length, nor names, shapes or metadata.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.runtime import trusting

BYTES, SHA256 = "file_bytes", "file_sha256"
BLANK = {BYTES: "0" * 16, SHA256: "0" * 64}
"""What a record holds until its file is sealed: strings of the final length."""

# As JSON within JSON: the header's strings are escaped once more.
_PLACE = {
    name: re.compile(rb'\\"%s\\": \\"([0-9a-f]{%d})\\"' % (name.encode(), len(blank))) for name, blank in BLANK.items()
}
CHUNK = 2**22


def sealed(data: bytes) -> list[bytes | memoryview]:
    """The bytes of a file with a blank seal, in pieces, with the seal in its place. The tensors are not copied."""
    header, tensors = bytearray(data[: _header_end(data)]), memoryview(data)[_header_end(data) :]
    _put(header, BYTES, f"{len(data):016d}")
    digest = hashlib.sha256(header)
    digest.update(tensors)
    _put(header, SHA256, digest.hexdigest())
    return [bytes(header), tensors]


def check_sealed_size(path: str | os.PathLike, record: JsonObject) -> None:
    """UserError: the file is longer or shorter than its record says, or its seal is broken. Reads nothing."""
    if (BYTES in record) != (SHA256 in record):
        raise damaged(path, "a part of its seal is missing")
    if BYTES in record and record[BYTES] != f"{os.stat(path).st_size:016d}":
        raise damaged(
            path, f"it has {os.stat(path).st_size:,} bytes, and was written with {str(record[BYTES]).lstrip('0')}"
        )


def check_digest(path: str | os.PathLike, record: JsonObject) -> None:
    """UserError: its bytes are not those that were written. A file from before there were seals passes; each is read
    once per process."""
    if SHA256 not in record or trusting():
        return
    key = _identity(path)
    if key in _seen:
        return
    digest = hashlib.sha256()
    for chunk in _blank_chunks(Path(path), str(record[SHA256])):
        digest.update(chunk)
    if digest.hexdigest() != record[SHA256]:
        raise damaged(path, "its bytes are not those that were written (sha256)")
    _seen.add(key)


def check_against(path: str | os.PathLike, sha256: str) -> bool:
    """Whether the file's bytes are those of a digest that is kept elsewhere, read once per process; `check_digest` need
    not read it then."""
    key = _identity(path)
    if trusting() or _known.get(key) == sha256:
        return True
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        return False
    _known[key] = sha256
    _seen.add(key)
    return True


def _identity(path: str | os.PathLike) -> tuple[str, int, int, int]:
    """What changes when a file is written again."""
    about = os.stat(path)
    return os.path.realpath(path), about.st_size, about.st_mtime_ns, about.st_ino


_seen: set[tuple[str, int, int, int]] = set()
_known: dict[tuple[str, int, int, int], str] = {}


def damaged(path: str | os.PathLike, why: str) -> UserError:
    """The refusal of a file whose bytes have changed."""
    return UserError(
        f"{path} is damaged: {why}",
        "make it again, or copy it again; `d2o --trust ...` reads it without looking at digests",
    )


def _blank_chunks(path: Path, digest: str) -> Iterator[bytes]:
    """The file in pieces, the digest in its header blanked."""
    with path.open("rb") as file:
        size = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = bytearray(file.read(size))
        found = _PLACE[SHA256].search(header)
        if found is not None and found[1] == digest.encode():
            _put(header, SHA256, BLANK[SHA256])
        yield bytes(header)
        while chunk := file.read(CHUNK):
            yield chunk


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _put(header: bytearray, name: str, text: str) -> None:
    found = _PLACE[name].search(header)
    assert found is not None, f"no {name} in the header"
    header[found.start(1) : found.end(1)] = text.encode()
