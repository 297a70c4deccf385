"""Whether a download whose sha256 nobody published is what its name says: a login page or half a file must not be kept
and pinned.

`wrong_start` judges the first bytes, as soon as they come; `check_content` the structure of the whole file, without
reading its values.
"""

from __future__ import annotations

import mmap
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

from d2o.inputs import json_object, parse_json
from d2o.interop.inert_pickle import Call, InertPickle, Malformed

START = 512
"""Bytes that are enough to know a kind of file by."""
MAX_HEADER, MAX_OPCODES = 100_000_000, 3_000_000

ZIP, NPY, GZIP, PARQUET = b"PK\x03\x04", b"\x93NUMPY", b"\x1f\x8b", b"PAR1"
PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
TORCH = "what torch.save writes"
KINDS: dict[str, tuple[str, tuple[bytes, ...]]] = {
    ".safetensors": ("a safetensors file", ()),
    ".pkl": ("a pickle", PICKLE),
    ".npz": ("an npz file", (ZIP,)),
    ".zip": ("a zip file", (ZIP,)),
    ".pt": (TORCH, (ZIP, *PICKLE)),
    ".pth": (TORCH, (ZIP, *PICKLE)),
    ".bin": (TORCH, (ZIP, *PICKLE)),
    ".ckpt": (TORCH, (ZIP, *PICKLE)),
    ".npy": ("an npy file", (NPY,)),
    ".gz": ("a gzip file", (GZIP,)),
    ".tgz": ("a gzip file", (GZIP,)),
    ".parquet": ("a parquet file", (PARQUET,)),
}
"""By suffix: what the file is, and what it may begin with."""
TEXTS = (".txt", ".jsonl", ".json")


def wrong_start(start: bytes, name: str) -> str | None:
    """Why a file that begins with these bytes (the whole of it, or at least START) is not what `name` says; None: it
    may be."""
    if not start:
        return "it is empty"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    suffix = os.path.splitext(name)[1].lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")) or (text.startswith(b"<?xml") and suffix != ".xml"):
        return "it is a web page (a login, or an error?)"
    what, starts = KINDS.get(suffix, ("", ()))
    if starts and not start.startswith(starts):
        return f"it is not {what}: it begins with {start[:8]!r}"
    if suffix == ".safetensors" and start[8:9] != b"{":
        return f"it is not {what}"
    if suffix in TEXTS and b"\0" in start:
        return "it is no text"
    return None


def check_content(path: Path, name: str) -> None:
    """ValueError: why the file at `path` is not whole, or not what `name` says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(START)
        if why := wrong_start(start, name):
            raise ValueError(why)
        if os.path.splitext(name)[1].lower() == ".safetensors":
            _safetensors(file, size)
        elif start.startswith(ZIP):
            _zip(path, size)
        elif start.startswith(PICKLE):
            _pickle(file)
        elif start.startswith(PARQUET) and _last(file, size, 4) != PARQUET:
            raise ValueError("it is cut off: a parquet file without its end")


def _safetensors(file: BinaryIO, size: int) -> None:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"it is cut off or no safetensors file: its header says that it has {length:,} bytes")
    try:
        header = json_object(parse_json(file.read(length)), "the header")
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError("it is no safetensors file: its header cannot be read") from error
    if end != size - 8 - length:
        raise ValueError(
            f"it is cut off or too long: its header promises {end:,} bytes of values, {size - 8 - length:,} are there"
        )


def _zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            whole = all(info.header_offset + 30 + info.compress_size <= size for info in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"it is cut off or damaged ({error})") from error
    if not whole:
        raise ValueError("it is damaged: a member reaches beyond the end")


class _Anything(dict):
    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> type:
        return Call


def _pickle(file: BinaryIO) -> None:
    """The first pickle in the file, as data: nothing is executed. (In torch's older format more follow, whose reader
    checks their lengths.)"""
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        InertPickle(data, _Anything(), MAX_OPCODES, persistent_ids=True, python2=True).load()
    except Malformed as error:
        raise ValueError(f"it {error}") from error


def _last(file: BinaryIO, size: int, count: int) -> bytes:
    file.seek(max(0, size - count))
    return file.read(count)
