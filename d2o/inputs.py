"""What d2o reads, held against stated limits before anything is allocated: a file says how much it holds, and may lie.

Every limit is several times what published files need. A size that a file declares is believed only as far as the file
could hold it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from d2o.errors import UserError

MAX_IMAGE_BYTES = 2**28
"""Of one image's file: 256 MiB."""
MAX_PIXELS = 2**26
"""Of one image, before it is decoded: 8192 x 8192."""
MAX_ARRAY_BYTES = 2**37
"""Of one array in an .npz: 128 GiB, fifty thousand images of 1024 x 1024 pixels."""
MAX_JSON_BYTES = 100_000_000
"""Of a JSON file or member: twice ImageNet's dataset.json."""
MAX_LOG_BYTES = 2**30
"""Of a run's metrics.jsonl."""
UNPACKED_FREELY, MAX_RATIO = 2**30, 100
"""What is packed may unpack to 1 GiB; to more only up to so many times its packed size (images and features shrink at
most to a few tenths)."""

JsonObject = dict[str, Any]
"""An object of a JSON text or of a file's metadata. What it must hold, its reader checks (`interop.records`)."""
Json = JsonObject | list[Any] | str | float | bool | None
"""A value of a JSON text."""


class TooLarge(ValueError):
    """A declared size beyond its limit; the text says which and what the limit is, without the file's name."""


def check_size(what: str, size: int, limit: int, unit: str = "bytes") -> None:
    """TooLarge unless the declared `size` of `what` is within the stated limit."""
    if not 0 <= size <= limit:
        raise TooLarge(f"{what} says that it has {size:,} {unit}; the limit is {limit:,}")


def check_unpacked(what: str, size: int, packed: int) -> None:
    """TooLarge if `packed` bytes would unpack to more than anything real does: a bomb."""
    limit = max(UNPACKED_FREELY, MAX_RATIO * packed)
    if size > limit:
        raise TooLarge(f"{what} would unpack from {packed:,} to {size:,} bytes; the limit is {limit:,}")


def check_input(path: str | os.PathLike[str], expected: str = "a file") -> int:
    """The size in bytes of the regular file at `path`, before it is opened: opening a named pipe waits for ever, a
    device has no end.

    UserError: not there, a folder, or no regular file.
    """
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no such file: {os.fspath(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"cannot read {os.fspath(path)}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(about.st_mode):
        raise UserError(f"{os.fspath(path)} is a folder; expected {expected}")
    if not stat.S_ISREG(about.st_mode):
        raise UserError(
            f"{os.fspath(path)} is {special_kind(about.st_mode)}; expected {expected}", "copy it into a file"
        )
    return about.st_size


def special_kind(mode: int) -> str:
    """What a path is that is neither a file nor a folder."""
    kinds = (
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for test, name in kinds if test(mode)), "no regular file")


def read_file(path: str | os.PathLike[str], limit: int, expected: str = "a file") -> bytes:
    """All bytes of a file. UserError: as `check_input`; larger than `limit` bytes; cannot be read."""
    size = check_input(path, expected)
    if size > limit:
        raise UserError(f"{os.fspath(path)} has {size:,} bytes; {expected} has at most {limit:,}")
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(path)}: {error.strerror or error}") from error


def parse_json(data: bytes | str, limit: int = MAX_JSON_BYTES) -> Json:
    """The value of a JSON text. ValueError, whatever is wrong with it: not UTF-8, not JSON, too long, nested too
    deeply."""
    if len(data) > limit:
        raise TooLarge(f"a JSON text of {len(data):,} bytes; the limit is {limit:,}")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON_BYTES) -> Json:
    """The value in a JSON file. UserError: as `read_file`, or not JSON."""
    try:
        return parse_json(read_file(path, limit, "a JSON file"), limit)
    except ValueError as error:
        raise UserError(f"{Path(path)} is not a readable JSON file ({error})") from error


def json_object(value: object, what: str) -> JsonObject:
    """The value, if it is an object of JSON. ValueError, naming `what`, for any other."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value
