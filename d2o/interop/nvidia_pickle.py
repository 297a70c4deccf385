"""Reads NVIDIA's network pickles (EDM, EDM2, and what descends from them) without running anything in them.

Such a file holds, for every network object, its Python source and its attributes; the official loader executes that
source. We take the
attributes only: `inert_pickle` yields plain data, and tensors are cut from their storages here, every bound checked
first.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.inputs import JsonObject, check_input
from d2o.interop.inert_pickle import Call, Global, InertPickle, Malformed, PersistentId
from d2o.interop.nvidia_config import EDM2_CLASSES, config_from_pickle

RECONSTRUCT = "torch_utils.persistence._reconstruct_persistent_obj"
PARAMETER = "torch._utils._rebuild_parameter"
TENSOR = "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
TORCH_MODULES = "torch.nn.modules."

EXPECTED: dict[str, type] = {
    "collections.OrderedDict": dict,
    "dnnlib.util.EasyDict": dict,
    "builtins.set": set,
    RECONSTRUCT: Call,
    PARAMETER: Call,
    TENSOR: Call,
    STORAGE: Call,
    f"{TORCH_MODULES}container.ModuleDict": Call,
    # Attributes that we have no use for: scale factors, latent statistics, bound hooks.
    "numpy.core.multiarray.scalar": Call,
    "numpy._core.multiarray.scalar": Call,
    "numpy.dtype": Call,
    "numpy.ndarray": Call,
    "numpy.core.multiarray._reconstruct": Call,
    "numpy._core.multiarray._reconstruct": Call,
    "builtins.getattr": Call,
}

CLASSES = {
    "EDMPrecond",
    "VPPrecond",
    "VEPrecond",
    "iDDPMPrecond",
    "SongUNet",
    "DhariwalUNet",
    "UNetBlock",
    "Conv2d",
    "Linear",
    "GroupNorm",
    "PositionalEmbedding",
    "FourierEmbedding",
    "Precond",
    "UNet",
    "Block",
    "MPConv",
    "MPFourier",
    "AugmentPipe",
    "StabilityVAEEncoder",
    "StandardRGBEncoder",
    "EDMPrecond_EncoderDecoder",
    "SongUNet_EncoderDecoder",
    "DhariwalUNet_EncoderDecoder",
    "EDM_2_Precond_EncoderDecoder",
    "EDM_2_Precond_Generator",
    "UNet_EncoderDecoder",
    "GDDPrecond",
    "D2OPrecond",
}
"""Objects that such files hold, besides losses (`*Loss`)."""

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
}
STORAGE_EXPECTED: dict[str, type] = {"collections.OrderedDict": dict, **{name: Call for name in DTYPES}}
STORAGE_MAGIC, STORAGE_VERSION = 0x1950A86A20F9469CFC6C, 1001

# Limits: several times what the largest official file needs (553 tensors, about 70 thousand opcodes, 5 levels of
# modules). References can name one thing many times, so what is walked is counted, not what is stored.
MAX_OPCODES, MAX_STORAGE_OPCODES, MAX_ENTRIES, MAX_DEPTH, MAX_DIMENSIONS, MAX_NAME = 300_000, 500, 20_000, 16, 8, 128

HINT = "d2o reads the network pickles of NVIDIA's EDM family; if this is one, download it again"


@dataclass(frozen=True)
class NvidiaNetwork:
    """A network as its file describes it.

    `class_name` of the outermost module, e.g. EDMPrecond; the `init_kwargs` that it was made with (plain values; others
    appear as text); `state_dict` with the official names and order, on the CPU; `root_keys` of the file; `encoder`, the
    class of EDM2's image encoder.
    """

    path: Path
    class_name: str
    init_kwargs: JsonObject
    state_dict: dict[str, Tensor]
    root_keys: tuple[str, ...]
    encoder: str | None = None

    def config(self) -> JsonObject:
        """What `d2o.networks.build.build_network` takes. UserError: a class, or an option of one, that d2o has no
        network for."""
        try:
            return config_from_pickle(self.class_name, self.init_kwargs, "logvar_linear.weight" in self.state_dict)
        except Malformed as error:
            hint = (
                "d2o runs the denoisers of EDM (SongUNet and DhariwalUNet in any of its preconditionings) and EDM2, and"
                " SiD's, SiDA's and GDD's"
            )
            raise UserError(f"{self.path} {error}", hint) from error

    @property
    def space(self) -> str:
        """What the network denoises: "latent" for the latents of Stable Diffusion's autoencoder (EDM2 on ImageNet-512),
        else "pixel"."""
        if self.encoder is None:  # SiDA's snapshots do not say
            return (
                "latent" if self.class_name in EDM2_CLASSES and self.init_kwargs.get("img_channels") == 4 else "pixel"
            )
        return "latent" if self.encoder == "StabilityVAEEncoder" else "pixel"

    @property
    def steps(self) -> int:
        """Heun steps of the papers' samplers: EDM2 32; EDM 18 up to 32x32, 40 above."""
        if self.class_name in EDM2_CLASSES:
            return 32
        return 18 if self.init_kwargs.get("img_resolution", 0) <= 32 else 40


def read_nvidia_pickle(
    path: str | Path, key: str = "ema", dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> NvidiaNetwork:
    """The network that the file holds under `key`: "ema", its published weights; some snapshots also have "net", the
    weights without averaging.

    `dtype`: every floating-point tensor is converted as it is read (so that only one copy of the weights is ever in
    memory); None keeps the stored precision. `device` "meta": no values are read, only what the file says of them.
    UserError: missing, truncated or damaged file, no such key (with those it has), or anything in it that such files do
    not hold (named).
    """
    path = Path(path)
    size = check_input(path, "a network pickle")
    try:
        with open(path, "rb") as file:
            # A private mapping: tensors are copied straight out of it, so that the weights are in memory once.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)) if size else memoryview(b"")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return _read(path, data, key, dtype, device)
    except Malformed as error:
        raise UserError(f"{path} {error}", HINT) from error


def _read(
    path: Path, data: memoryview, key: str, dtype: torch.dtype | None, device: str | torch.device
) -> NvidiaNetwork:
    if bytes(data[:4]) == b"PK\x03\x04":
        raise Malformed("is an archive as torch.save writes them (a training state?), not a network pickle")
    if bytes(data[:1]) != b"\x80" or data[1:2] not in (b"\x03", b"\x04", b"\x05"):
        raise Malformed("is not a pickle of protocol 3 to 5")
    reader = InertPickle(data, EXPECTED, MAX_OPCODES)
    root = reader.load()
    for call in reader.calls:
        if call.name == RECONSTRUCT:
            name = check_persistent(call)
            if not (name in CLASSES or (name.endswith("Loss") and len(name) <= MAX_NAME)):
                raise Malformed(f"holds an object of class {name[:100]!r}, which d2o does not know")
    if not isinstance(root, dict) or not _is(root.get(key), RECONSTRUCT):
        others = (
            [f"{name!r:.100}" for name, value in root.items() if _is(value, RECONSTRUCT)]
            if isinstance(root, dict)
            else []
        )
        raise Malformed(
            f"holds no network under {key!r}" + (f"; its objects are {', '.join(others[:8])}" if others else "")
        )
    meta = root[key].args[0]
    attributes = _dict(meta["state"], "state")
    kwargs = _dict(attributes.get("_init_kwargs"), "_init_kwargs")
    if attributes.get("_init_args") or len(kwargs) > 64:
        raise Malformed("does not name the options that its network was made with")
    plain = {str(name): _plain(value) for name, value in kwargs.items()}
    encoder = root["encoder"].args[0]["class_name"] if _is(root.get("encoder"), RECONSTRUCT) else None
    tensors = StateDict(root[key], len(data), dtype, device).tensors
    return NvidiaNetwork(path, meta["class_name"], plain, tensors, tuple(map(str, root)), encoder)


def check_persistent(call: Call) -> str:
    """The class name of an object that is described as NVIDIA's files do. Raises Malformed."""
    meta = call.args[0] if len(call.args) == 1 else None
    if (
        not isinstance(meta, dict)
        or len(meta) != 5
        or set(meta) != {"type", "version", "module_src", "class_name", "state"}
    ):
        raise Malformed("holds an object that is not described as NVIDIA's files do")
    if meta["type"] != "class" or meta["version"] != 6:
        raise Malformed("holds an object of another version than 6")
    if not isinstance(meta["class_name"], str):
        raise Malformed(f"holds an object of class {type(meta['class_name'])!r}, which d2o does not know")
    return meta["class_name"]


class StateDict:
    """Collects parameters, then persistent buffers, then those of the submodules, in the file's order: as torch's
    state_dict does.

    A module is an object of NVIDIA's or one of torch's own classes. Raises Malformed.
    """

    def __init__(self, network: Call, bytes_left: int, dtype: torch.dtype | None, device: str | torch.device = "cpu"):
        self.tensors: dict[str, Tensor] = {}
        self.dtype, self.device = dtype, torch.device(device)
        self.bytes_left = (
            bytes_left  # all tensors together are no larger than the file: nothing can be multiplied by reference
        )
        self.entries_left = MAX_ENTRIES
        self.add_module(network, "", 0)

    def add_module(self, module: object, prefix: str, depth: int) -> None:
        if _is(module, RECONSTRUCT):
            attributes = _dict(module.args[0]["state"], prefix)
        elif isinstance(module, Call) and module.name.startswith(TORCH_MODULES):
            attributes = _dict(module.state, prefix)
        else:
            raise Malformed(f"has {prefix!r}, which is no module")
        parameters, buffers, modules = (
            _dict(attributes.get(key), prefix) for key in ("_parameters", "_buffers", "_modules")
        )
        self.entries_left -= 1 + len(parameters) + len(buffers) + len(modules)
        if depth > MAX_DEPTH or self.entries_left < 0:
            raise Malformed("holds more modules, or nests them deeper, than any network of its kind")
        hidden = attributes.get("_non_persistent_buffers_set", set())
        if not isinstance(hidden, set) or any(len(str(name)) > MAX_NAME for name in (*parameters, *buffers, *modules)):
            raise Malformed(f"has a damaged module {prefix!r}")
        for name, value in parameters.items():
            self.add_tensor(value, f"{prefix}{name}")
        for name, value in buffers.items():
            if name not in hidden:
                self.add_tensor(value, f"{prefix}{name}")
        for name, child in modules.items():
            if child is not None:
                self.add_module(child, f"{prefix}{name}.", depth + 1)

    def add_tensor(self, value: object, name: str) -> None:
        if value is None:
            return
        if name in self.tensors:
            raise Malformed(f"has two tensors {name!r}")
        if _is(value, PARAMETER) and value.args:
            value = value.args[0]
        try:
            tensor = self.tensor(value)
            self.tensors[name] = (
                tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor
            )
        except Malformed as error:
            raise Malformed(f"has a damaged tensor {name!r}: it {error}") from error

    def tensor(self, value: object) -> Tensor:
        if not _is(value, TENSOR) or len(value.args) < 4:
            raise Malformed("is no tensor")
        storage, offset, size, stride = value.args[:4]
        if not _is(storage, STORAGE) or len(storage.args) != 1 or not isinstance(storage.args[0], memoryview):
            raise Malformed("has no storage")
        self.charge(len(storage.args[0]))
        raw, dtype = read_storage(storage.args[0])
        available = len(raw) // dtype.itemsize
        if not (_sizes([offset]) and _sizes(size) and _sizes(stride) and len(size) == len(stride)):
            raise Malformed("has no valid shape")
        count = math.prod(size)
        if offset > available or (count and offset + sum((n - 1) * step for n, step in zip(size, stride)) >= available):
            raise Malformed("reaches beyond its storage")
        self.charge(max(0, count * dtype.itemsize - len(raw)))
        if not count or self.device.type == "meta":
            return torch.empty(tuple(size), dtype=dtype, device=self.device)
        # Copied as bytes first: the file does not align its tensors.
        return (
            torch.frombuffer(raw, dtype=torch.uint8).clone().view(dtype).as_strided(size, stride, offset).contiguous()
        )

    def charge(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise Malformed("brings all tensors to more bytes than the file has")


def read_storage(data: memoryview) -> tuple[memoryview, torch.dtype]:
    """The raw values (a view of `data`) and type of a storage in torch's legacy format: five pickles, a count,
    little-endian values.

    torch.load(weights_only=True) reads the same, but can be kept busy for ever (a nested tuple as a dictionary key).
    Raises Malformed.
    """
    reader = InertPickle(data, STORAGE_EXPECTED, MAX_STORAGE_OPCODES, persistent_ids=True)
    magic, version, system, value, _ = (reader.load() for _ in range(5))
    if type(magic) is not int or magic != STORAGE_MAGIC or type(version) is not int or version != STORAGE_VERSION:
        raise Malformed("is not in torch's legacy format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Malformed("is not little-endian")
    record = value.value if isinstance(value, PersistentId) else None
    if not isinstance(record, tuple) or len(record) != 6 or record[0] != "storage" or record[5] is not None:
        raise Malformed("has no storage record")
    kind, count = record[1], record[4]
    if not isinstance(kind, Global) or kind.name not in DTYPES:
        raise Malformed("has values of an unsupported type")
    if int.from_bytes(reader.take(8), "little") != count:
        raise Malformed("has a storage of contradictory length")
    raw = data[reader.position :]
    if len(raw) != count * DTYPES[kind.name].itemsize:
        raise Malformed("has a storage of another length than it says")
    return raw, DTYPES[kind.name]


def _is(value: object, name: str) -> TypeGuard[Call]:
    return isinstance(value, Call) and value.name == name


def _dict(value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"has a damaged module {where!r}")
    return value


def _sizes(values: object) -> TypeGuard[Sequence[int]]:
    return (
        isinstance(values, tuple | list)
        and len(values) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**48 for n in values)
    )


def _plain(value: object, depth: int = 0) -> object:
    """Configuration values as JSON has them; anything else as the name of its kind."""
    if isinstance(value, str | int | float | None):
        return value
    if depth < 2 and isinstance(value, tuple | list) and len(value) <= 64:
        return [_plain(v, depth + 1) for v in value]
    if depth < 2 and isinstance(value, dict) and len(value) <= 64:
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    return f"<{value.name if isinstance(value, Call) else type(value).__name__}>"
