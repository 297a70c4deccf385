"""Reads .npz and .npy as numpy writes them; no array is allocated before its declared shape is found to fit the bytes
that are there."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from d2o.errors import UserError
from d2o.inputs import MAX_ARRAY_BYTES, check_input, check_size, check_unpacked
from d2o.interop.zips import zip_members

DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
"""What zipfile and numpy raise for damaged files (RuntimeError: an encrypted member)."""


def npz_names(path: str | os.PathLike[str]) -> list[str]:
    """The arrays in an .npz, in the file's order; none if it is something else. Reads the zip's directory alone."""
    try:
        check_input(path)
        with zipfile.ZipFile(path) as file:
            names = [info.filename for info in zip_members(file)]
    except (UserError, *DAMAGED):
        return []
    return [name.removesuffix(".npy") for name in names] if all(name.endswith(".npy") for name in names) else []


def read_npz(path: str | os.PathLike[str], wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The arrays of those names that are `wanted`. Objects are not read. UserError: as `check_input`. ValueError:
    damaged, or declares more than it holds or than the limits; the text names the array."""
    size = check_input(path, "an .npz file")
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in zip_members(archive):
                name = info.filename.removesuffix(".npy")
                if info.filename == name or not wanted(name):
                    continue
                check_size(f"the packed array {name!r}", info.compress_size, size)
                check_unpacked(f"the array {name!r}", info.file_size, info.compress_size)
                with archive.open(info) as file:
                    arrays[name] = _read(file, info.file_size, f"the array {name!r}")
    except ValueError:
        raise
    except DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return arrays


def read_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file's bytes. ValueError: damaged, or declares another size than it has."""
    try:
        return _read(io.BytesIO(data), len(data), "its header")
    except ValueError:
        raise
    except DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _read(file: IO[bytes], size: int, what: str) -> np.ndarray:
    """An array from a stream of `size` bytes that starts with its header."""
    shape, dtype, begin = _header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    if not all(isinstance(n, int) and 0 <= n < 2**40 for n in shape) or math.prod(shape) > 2**40:
        raise ValueError(f"{what} says that it has the shape {shape}")
    count = math.prod(shape) * dtype.itemsize
    check_size(what, count, MAX_ARRAY_BYTES)
    if count != size - begin:
        raise ValueError(
            f"{what} says that it has {count:,} bytes ({dtype} {list(shape)}), and {size - begin:,} are there"
        )
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, type, where the values begin)."""
    start = io.BytesIO(file.read(1 << 16))  # a header may say that it has 4 GiB
    try:
        version = np.lib.format.read_magic(start)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(start)
    except Exception as error:  # numpy parses it as a Python literal, which fails in many ways
        raise ValueError(
            f"damaged .npy header ({(str(error).splitlines() or [type(error).__name__])[0][:100]})"
        ) from error
    return shape, dtype, start.tell()
