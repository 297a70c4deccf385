"""Numpy arrays in pickles, .npy object files and torch.save archives, read as data: nothing is imported, called or
constructed.

`inert_pickle` yields what numpy would have been called with; arrays are cut from their bytes here. Admitted: numbers
and texts, dicts, lists and tuples of them, arrays and scalars of booleans, integers and floats, and object arrays of
all these. As numpy 1 and 2 pickle them (`numpy.core` and `numpy._core`), in the protocols 2 (torch.save) to 5.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import numpy as np

from d2o.errors import UserError
from d2o.inputs import check_input
from d2o.interop.inert_pickle import Call, Global, InertPickle, Malformed

_RECONSTRUCT = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}
_SCALAR = {f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")}
_FROM_BUFFER = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
_ENCODE, _EMPTY = "_codecs.encode", "__builtin__.bytes"  # how protocol 2 spells bytes, and none
_ARRAY, _DTYPE = "numpy.ndarray", "numpy.dtype"
EXPECTED: dict[str, type] = {
    **dict.fromkeys((*_RECONSTRUCT, *_SCALAR, *_FROM_BUFFER, _ENCODE, _EMPTY, _ARRAY, _DTYPE), Call),
    "collections.OrderedDict": dict,
    "dnnlib.util.EasyDict": dict,
}

# Limits: a file of statistics has fewer than 100 opcodes; one with the features of 50,000 images in batches has some
# 20,000.
MAX_OPCODES, MAX_VALUES, MAX_DEPTH, MAX_DIMENSIONS = 200_000, 100_000, 8, 8

HINT = (
    "nothing in it was executed: d2o reads pickles of plain numpy arrays only; download it again, or save the arrays"
    " with numpy.savez"
)


def read_pickled(path: str | Path) -> object:
    """The value in a file of pickled numpy arrays: a plain pickle, an .npy of objects, or what torch.save made of numpy
    arrays.

    Object arrays become lists (of no dimension: their one value); byte strings become `bytes`. UserError: missing,
    truncated or damaged, or anything in it but plain data and numpy arrays (named).
    """
    path = Path(path)
    with _mapped(path) as data:
        try:
            return loads(_pickle_within(data))
        except Malformed as error:
            raise UserError(f"{path} {error}", HINT) from error


def pickled_keys(path: str | Path) -> set[str]:
    """The keys of the dict in such a file, without reading its arrays; none where it holds no dict or cannot be
    read."""
    with contextlib.suppress(UserError, Malformed), _mapped(Path(path)) as data:
        root = InertPickle(_pickle_within(data), EXPECTED, MAX_OPCODES).load()
        if (
            _is(root, _RECONSTRUCT)
            and isinstance(root.state, tuple)
            and len(root.state) == 5
            and isinstance(root.state[4], list)
        ):
            root = root.state[4][0] if root.state[4] else None  # the one value of an .npy
        return {key for key in root if isinstance(key, str)} if isinstance(root, dict) else set()
    return set()


def loads(data: bytes | memoryview, python2: bool = False) -> object:
    """The value of one pickle, as `read_pickled` gives it; `python2`: one that Python 2 may have written. Raises
    Malformed."""
    data = memoryview(data)
    if bytes(data[:1]) != b"\x80":
        raise Malformed("is not a pickle of protocol 2 to 5")
    return _Values(len(data)).value(InertPickle(data, EXPECTED, MAX_OPCODES, python2=python2).load(), 0)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """The file's bytes, without reading those that are not looked at. UserError: missing or unreadable."""
    size = check_input(path)
    try:
        with open(path, "rb") as file:
            yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _pickle_within(data: memoryview) -> memoryview:
    """The pickle in a file: the whole of it, what follows the header of an .npy, or `data.pkl` of a torch archive.
    Raises Malformed."""
    if bytes(data[:6]) == b"\x93NUMPY":
        return data[_npy_header(data) :]
    if bytes(data[:4]) == b"PK\3\4":
        return _archived(data)
    return data


def _npy_header(data: memoryview) -> int:
    """Where the values of an .npy of one object begin."""
    start = io.BytesIO(data[: 1 << 16])
    try:
        version = np.lib.format.read_magic(start)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(start)
    except Exception as error:  # numpy parses the header as Python literals, which fail in many ways
        raise Malformed("has a damaged .npy header") from error
    if dtype != np.dtype("O") or shape != ():
        raise Malformed(
            f"holds one array of shape {list(shape)} and type {dtype}, not the dict of arrays that is read here"
        )
    return start.tell()


def _archived(data: memoryview) -> memoryview:
    try:
        with zipfile.ZipFile(_View(data)) as archive:
            found = [info for info in archive.infolist() if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
            if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED or found[0].file_size > len(data):
                raise Malformed("is an archive, but not one that torch.save wrote")
            return memoryview(archive.read(found[0]))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise Malformed(f"is a damaged archive ({error})") from error


class _View(io.RawIOBase):
    """A memoryview as a file, not copied."""

    def __init__(self, data: memoryview):
        self.bytes, self.place = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, (0, self.place, len(self.bytes))[whence] + offset)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # all that it is given
        part = self.bytes[self.place : self.place + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


class _Values:
    """Turns records into values. Each is worked out once, and no more values and bytes than the file can hold:
    references multiply nothing."""

    def __init__(self, size: int):
        self.bytes_left, self.values_left = size, MAX_VALUES
        self.done: dict[int, object] = {}  # by id; the unpickled root keeps the objects alive

    def value(self, item: object, depth: int) -> object:
        if item is None or isinstance(item, bool | int | float | str):
            return item
        if id(item) in self.done:
            return self.done[id(item)]
        self.values_left -= 1
        if depth > MAX_DEPTH or self.values_left < 0:
            raise Malformed("holds more values, or nests them deeper, than a file of its kind")
        self.done[id(item)] = made = self._make(item, depth + 1)
        return made

    def _make(self, item: object, depth: int) -> object:
        if isinstance(item, dict):
            return {key: self.value(value, depth) for key, value in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(self.value(value, depth) for value in item)
        if isinstance(item, memoryview) or _is(item, {_ENCODE, _EMPTY}):
            return self._bytes(item)
        if _is(item, _RECONSTRUCT):
            return self._array(item, depth)
        if _is(item, _SCALAR) and len(item.args) == 2:
            return self._numbers(item.args[1], self._dtype(item.args[0]), (), False)[()]
        if _is(item, _FROM_BUFFER) and len(item.args) == 4:
            raw, dtype, shape, order = item.args
            return self._numbers(raw, self._dtype(dtype), self._shape(shape), order == "F")
        raise Malformed(
            f"holds a {item.name if isinstance(item, Call | Global) else type(item).__name__}, which is no numpy array"
        )

    def _array(self, item: Call, depth: int) -> object:
        state = item.state
        if not isinstance(state, tuple) or len(state) != 5:
            raise Malformed("holds an array without its values")
        shape, dtype, fortran, raw = self._shape(state[1]), self._dtype(state[2]), state[3], state[4]
        if dtype != np.dtype("O"):
            return self._numbers(raw, dtype, shape, bool(fortran))
        if not isinstance(raw, list) or len(shape) > 1 or len(raw) != math.prod(shape):
            raise Malformed(f"holds an array of objects of shape {list(shape)}, which is not read")
        found = [self.value(value, depth) for value in raw]
        return found if shape else found[0]

    def _numbers(self, raw: object, dtype: np.dtype, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
        data = self._bytes(raw)
        if dtype == np.dtype("O") or len(data) != math.prod(shape) * dtype.itemsize:
            raise Malformed(
                f"holds an array of {len(data)} bytes, which does not fit its shape {list(shape)} and type {dtype}"
            )
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("="), copy=False)

    def _bytes(self, raw: object) -> bytes:
        if _is(raw, {_ENCODE}):
            if len(raw.args) != 2 or type(raw.args[0]) is not str or raw.args[1] != "latin1":
                raise Malformed("holds bytes in an unknown spelling")
            try:
                raw = raw.args[0].encode("latin1")
            except UnicodeEncodeError as error:
                raise Malformed("is damaged: bytes beyond 255") from error
        if _is(raw, {_EMPTY}) and not raw.args:
            raw = b""
        if not isinstance(raw, bytes | memoryview):
            raise Malformed(f"is damaged: a {type(raw).__name__} where the bytes of an array belong")
        self.bytes_left -= len(raw)
        if self.bytes_left < 0:
            raise Malformed("brings all arrays to more bytes than the file has")
        return bytes(raw)

    def _dtype(self, item: object) -> np.dtype:
        if not _is(item, {_DTYPE}) or not item.args or not isinstance(item.args[0], str):
            raise Malformed("holds an array without a type")
        name, state = item.args[0], item.state
        if name in ("O", "O8"):
            return np.dtype("O")
        if not re.fullmatch(r"[fiu][1248]|b1", name) or name == "f1":
            raise Malformed(f"holds values of type {name[:20]!r}; only numbers are read")
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        if not isinstance(order, str) or order not in ("<", ">", "=", "|"):
            raise Malformed("is damaged: a type of unknown byte order")
        return np.dtype(name).newbyteorder(order)  # type: ignore[arg-type]

    def _shape(self, shape: object) -> tuple[int, ...]:
        if (
            not isinstance(shape, tuple)
            or len(shape) > MAX_DIMENSIONS
            or not all(type(n) is int and 0 <= n < 2**40 for n in shape)
        ):
            raise Malformed("is damaged: an array without a valid shape")
        return shape


def _is(value: object, names: set[str]) -> TypeGuard[Call]:
    return isinstance(value, Call) and value.name in names
