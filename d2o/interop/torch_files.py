"""Reads the tensors of a published weights file by name, whatever it is packed in, and never executes anything in it.

Safetensors; torch.save's archives and its older format; TorchScript archives, whose code is not looked at; and pickles
of whole modules as NVIDIA publishes them.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from d2o.errors import UserError
from d2o.inputs import check_input
from d2o.interop.inert_pickle import Call, Global, InertPickle, Malformed, PersistentId
from d2o.interop.nvidia_pickle import (
    EXPECTED,
    RECONSTRUCT,
    STORAGE_MAGIC,
    TENSOR,
    TORCH_MODULES,
    StateDict,
    check_persistent,
)

HINT = (
    "expected published weights: .safetensors, what torch.save wrote, TorchScript, or NVIDIA's .pkl; if it is one,"
    " download it again"
)

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
SCRIPT_EXPECTED: dict[str, type] = {
    "collections.OrderedDict": dict,
    TENSOR: Call,
    **{f"torch.{name}": Call for name in DTYPES},
}
LEGACY_MAGIC = (
    b"\x80\x02\x8a\x0a" + STORAGE_MAGIC.to_bytes(10, "little") + b"."
)  # the pickle that the older format of torch.save begins with

# Limits: several times what the largest of these networks need.
MAX_OPCODES, MAX_ENTRIES, MAX_DEPTH, MAX_SCRIPT_PICKLE = 3_000_000, 100_000, 64, 256 * 2**20


class _Families(dict):
    """`expected` for InertPickle, which also has, as a record, every name that begins with one of `families`."""

    def __init__(self, expected: Mapping[str, type], *families: str):
        super().__init__(expected)
        self.families = families

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and name.startswith(self.families))

    def __missing__(self, name: str) -> type:
        return Call


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor in the file, on the CPU in its stored precision, under its name in the module or the nested
    dictionaries that hold it ("layers.conv.weight", "state_dict.layers.conv.weight"). What is no tensor is left out.

    UserError: missing, truncated, damaged or foreign file; one that holds no tensor; one that would execute something.
    """
    path = Path(path)
    check_input(path, "a weights file")
    try:
        tensors = _read(path)
        if not tensors:
            raise Malformed("holds no tensors")
    except Malformed as error:
        raise UserError(f"{path} {error}", HINT) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(32)
    if head[:4] == b"PK\x03\x04":
        return _archive(path, size)
    if head.startswith(LEGACY_MAGIC):
        return _saved(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        try:
            return load_file(path)
        except SafetensorError as error:
            raise Malformed(f"is truncated or not a safetensors file ({error})") from error
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return _module_pickle(path)
    raise Malformed("is no weights file of a known kind" if size else "is empty")


# What torch.save wrote


def _archive(path: Path, size: int) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
            # torch stores tensors as they are; compressed ones could be made to fill the memory.
            if sum(file.file_size for file in files) > size + MAX_SCRIPT_PICKLE:
                raise Malformed("would unpack to much more than its size")
            pickles = [
                file.filename for file in files if file.filename.endswith("/data.pkl") and file.filename.count("/") == 1
            ]
            if len(pickles) != 1:
                raise Malformed("is a zip file, but not one that torch.save or TorchScript wrote")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}constants.pkl" in archive.namelist():
                return _Script(archive, root).tensors
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as error:
        raise Malformed(f"is a damaged archive ({_line(error)})") from error
    return _saved(path)


def _saved(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: TypedStorage is deprecated
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names what it refused in the middle of much advice that is none here.
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise Malformed(
                f"refers to {named[1][:200]!r}, which has no place in a weights file (nothing was executed)"
            ) from error
        raise Malformed("is damaged, or holds more than tensors and plain values") from error
    except Exception as error:  # torch has no list of what damaged files may raise
        raise Malformed(f"is truncated or damaged ({type(error).__name__}: {_line(error)})") from error
    return _flatten(found)


def _flatten(found: object) -> dict[str, Tensor]:
    """The tensors in nested dictionaries, in their order."""
    tensors: dict[str, Tensor] = {}
    waiting, seen = [("", found, 0)], 0
    while waiting:
        name, value, depth = waiting.pop()
        seen += 1  # a dictionary can hold itself
        if seen > MAX_ENTRIES or depth > MAX_DEPTH:
            raise Malformed("holds more tensors, or nests them deeper, than any network")
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
        elif isinstance(value, Mapping):
            children = [(f"{name}.{key}" if name else str(key), child, depth + 1) for key, child in value.items()]
            waiting += reversed(children)
    return tensors


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


# TorchScript


class _Script:
    """Collects the tensors of a TorchScript archive: the attributes of its objects, and of theirs, under their
    names."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        self.archive, self.root = archive, root
        self.tensors: dict[str, Tensor] = {}
        self.storages: dict[str, Tensor] = {}
        self.entries_left = MAX_ENTRIES
        expected = _Families(SCRIPT_EXPECTED, "__torch__.", "torch.jit._pickle.")
        reader = InertPickle(memoryview(archive.read(f"{root}data.pkl")), expected, MAX_OPCODES, persistent_ids=True)
        self.add(reader.load(), "", 0)

    def add(self, value: object, name: str, depth: int) -> None:
        if isinstance(value, Call) and value.name == TENSOR:
            try:
                self.tensors[name] = self.tensor(value)
            except Malformed as error:
                raise Malformed(f"has a damaged tensor {name[:100]!r}: it {error}") from error
            return
        attributes = value.state if isinstance(value, Call) else value
        if isinstance(attributes, dict):
            self.entries_left -= 1 + len(attributes)
            if depth > MAX_DEPTH or self.entries_left < 0:
                raise Malformed("holds more modules, or nests them deeper, than any network")
            for key, child in attributes.items():
                self.add(child, f"{name}.{key}" if name else str(key), depth + 1)

    def tensor(self, call: Call) -> Tensor:
        if len(call.args) < 4 or not isinstance(call.args[0], PersistentId):
            raise Malformed("has no storage")
        storage = self.storage(call.args[0].value)
        offset, size, stride = call.args[1:4]
        if not (_sizes((offset,)) and _sizes(size) and _sizes(stride) and len(size) == len(stride)):
            raise Malformed("has no valid shape")
        if math.prod(size) and offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(storage):
            raise Malformed("reaches beyond its storage")
        return storage.as_strided(size, stride, offset) if math.prod(size) else torch.empty(size, dtype=storage.dtype)

    def storage(self, record: object) -> Tensor:
        """The flat values of ("storage", type, key, device, count). Read once; tensors that share it are views."""
        if not (
            isinstance(record, tuple)
            and len(record) == 5
            and isinstance(record[1], Global)
            and isinstance(record[2], str)
        ):
            raise Malformed("has no storage record")
        kind, key, count = record[1].name, record[2], record[4]
        dtype = DTYPES.get(kind.removeprefix("torch."))
        if dtype is None:
            raise Malformed(f"has values of the unsupported type {kind!r}")
        if key not in self.storages:
            name = f"{self.root}data/{key}"
            if name not in self.archive.NameToInfo:
                raise Malformed(f"has its values in {name[:100]!r}, which is not in the file")
            length = self.archive.getinfo(name).file_size
            if type(count) is not int or count * dtype.itemsize != length:
                raise Malformed("has a storage of another length than it says")
            content = bytearray(self.archive.read(name))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if length else torch.empty(0, dtype=dtype)
        if self.storages[key].dtype != dtype:
            raise Malformed("has a storage of two types")
        return self.storages[key]


def _sizes(values: object) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(values, tuple | list) and len(values) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in values)
    )


# Pickles of whole modules


def _module_pickle(path: Path) -> dict[str, Tensor]:
    """A module whose classes came with the file, as NVIDIA's `persistence` writes them, or a dictionary of such: its
    state dict."""
    with open(path, "rb") as file:
        # A private mapping: tensors are copied straight out of it, so that the weights are in memory once.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    reader = InertPickle(data, _Families(EXPECTED, TORCH_MODULES), MAX_OPCODES)
    root = reader.load()
    for call in reader.calls:
        if call.name == RECONSTRUCT:
            check_persistent(call)
    if _is_module(root):
        return StateDict(root, len(data), None).tensors
    if not isinstance(root, dict):
        raise Malformed("is a pickle that holds no module")
    tensors: dict[str, Tensor] = {}
    left = len(data)
    for name, value in root.items():
        if _is_module(value):
            found = StateDict(value, left, None).tensors
            left -= sum(tensor.nbytes for tensor in found.values())
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in found.items()}
    return tensors


def _is_module(value: object) -> TypeGuard[Call]:
    return isinstance(value, Call) and (value.name == RECONSTRUCT or value.name.startswith(TORCH_MODULES))
