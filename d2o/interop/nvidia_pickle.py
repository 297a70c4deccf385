"""Reads NVIDIA's network pickles (EDM, EDM2, and what descends from them) without running anything in them.

Such a file holds, for every network object, its Python source and its attributes; the official loader executes that source. We take the
attributes only: `inert_pickle` yields plain data, and tensors are cut from their storages here, every bound checked first.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.interop.inert_pickle import Call, Global, InertPickle, Malformed, PersistentId

RECONSTRUCT = "torch_utils.persistence._reconstruct_persistent_obj"
PARAMETER = "torch._utils._rebuild_parameter"
TENSOR = "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
MODULE_DICT = "torch.nn.modules.container.ModuleDict"

EXPECTED: dict[str, type] = {
    "collections.OrderedDict": dict, "dnnlib.util.EasyDict": dict, "builtins.set": set,
    RECONSTRUCT: Call, PARAMETER: Call, TENSOR: Call, STORAGE: Call, MODULE_DICT: Call,
    # Attributes that we have no use for: scale factors, latent statistics, bound hooks.
    "numpy.core.multiarray.scalar": Call, "numpy._core.multiarray.scalar": Call, "numpy.dtype": Call, "numpy.ndarray": Call,
    "numpy.core.multiarray._reconstruct": Call, "numpy._core.multiarray._reconstruct": Call, "builtins.getattr": Call,
}  # fmt: skip

CLASSES = {
    "EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "SongUNet", "DhariwalUNet", "UNetBlock", "Conv2d", "Linear", "GroupNorm",
    "PositionalEmbedding", "FourierEmbedding", "Precond", "UNet", "Block", "MPConv", "MPFourier", "AugmentPipe", "StabilityVAEEncoder",
    "StandardRGBEncoder", "EDMPrecond_EncoderDecoder", "SongUNet_EncoderDecoder", "DhariwalUNet_EncoderDecoder",
    "EDM_2_Precond_EncoderDecoder", "EDM_2_Precond_Generator", "UNet_EncoderDecoder",
}  # fmt: skip
"""Objects that such files hold, besides losses (`*Loss`)."""

DTYPES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16, "torch.BFloat16Storage": torch.bfloat16,
          "torch.DoubleStorage": torch.float64, "torch.LongStorage": torch.int64}  # fmt: skip
STORAGE_EXPECTED: dict[str, type] = {"collections.OrderedDict": dict, **{name: Call for name in DTYPES}}
STORAGE_MAGIC, STORAGE_VERSION = 0x1950A86A20F9469CFC6C, 1001

# Limits: several times what the largest official file needs (553 tensors, about 70 thousand opcodes, 5 levels of modules).
# References can name one thing many times, so what is walked is counted, not what is stored.
MAX_OPCODES, MAX_STORAGE_OPCODES, MAX_ENTRIES, MAX_DEPTH, MAX_DIMENSIONS, MAX_NAME = 300_000, 500, 20_000, 16, 8, 128

HINT = "d2o reads the network pickles of NVIDIA's EDM family; if this is one, download it again"


@dataclass(frozen=True)
class NvidiaNetwork:
    """A network as its file describes it.

    `class_name` of the outermost module, e.g. EDMPrecond; the `init_kwargs` that it was made with (plain values; others appear as text);
    `state_dict` with the official names and order, stored precision, on the CPU; `root_keys` of the file.
    """

    path: Path
    class_name: str
    init_kwargs: dict[str, Any]
    state_dict: dict[str, Tensor]
    root_keys: tuple[str, ...]

    def config(self) -> dict[str, Any]:
        """What `d2o.networks.build.build_network` takes. UserError: a class, or an option of one, that d2o has no network for."""
        try:
            return _edm_config(self.class_name, self.init_kwargs)
        except Malformed as error:
            hint = "d2o runs EDM's networks: EDMPrecond around SongUNet (DDPM++, NCSN++) or DhariwalUNet (ADM)"
            raise UserError(f"{self.path} {error}", hint) from error


def read_nvidia_pickle(path: str | Path) -> NvidiaNetwork:
    """The network under `ema`. UserError: missing, truncated or damaged file, or anything in it that such files do not hold (named)."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            # A private mapping: tensors are copied straight out of it, so that the weights are in memory once.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)) if path.stat().st_size else memoryview(b"")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return _read(path, data)
    except Malformed as error:
        raise UserError(f"{path} {error}", HINT) from error


def _read(path: Path, data: memoryview) -> NvidiaNetwork:
    if bytes(data[:1]) != b"\x80" or data[1:2] not in (b"\x03", b"\x04", b"\x05"):
        raise Malformed("is not a pickle of protocol 3 to 5")
    reader = InertPickle(data, EXPECTED, MAX_OPCODES)
    root = reader.load()
    for call in reader.calls:
        if call.name == RECONSTRUCT:
            _check_persistent(call)
    if not isinstance(root, dict) or not _is(root.get("ema"), RECONSTRUCT):
        raise Malformed("holds no network under 'ema'")
    meta = root["ema"].args[0]
    attributes = _dict(meta["state"], "state")
    kwargs = _dict(attributes.get("_init_kwargs"), "_init_kwargs")
    if attributes.get("_init_args") or len(kwargs) > 64:
        raise Malformed("does not name the options that its network was made with")
    plain = {str(key): _plain(value) for key, value in kwargs.items()}
    return NvidiaNetwork(path, meta["class_name"], plain, _StateDict(root["ema"], len(data)).tensors, tuple(map(str, root)))


def _check_persistent(call: Call) -> None:
    meta = call.args[0] if len(call.args) == 1 else None
    if not isinstance(meta, dict) or len(meta) != 5 or set(meta) != {"type", "version", "module_src", "class_name", "state"}:
        raise Malformed("holds an object that is not described as NVIDIA's files do")
    if meta["type"] != "class" or meta["version"] != 6:
        raise Malformed("holds an object of another version than 6")
    name = meta["class_name"]
    if not isinstance(name, str) or not (name in CLASSES or (name.endswith("Loss") and len(name) <= MAX_NAME)):
        raise Malformed(f"holds an object of class {name[:100] if isinstance(name, str) else type(name)!r}, which d2o does not know")


class _StateDict:
    """Collects parameters, then persistent buffers, then those of the submodules, in the file's order: as torch's state_dict does."""

    def __init__(self, network: Call, bytes_left: int):
        self.tensors: dict[str, Tensor] = {}
        self.bytes_left = bytes_left  # all tensors together are no larger than the file: nothing can be multiplied by reference
        self.entries_left = MAX_ENTRIES
        self.add_module(network, "", 0)

    def add_module(self, module: Any, prefix: str, depth: int) -> None:
        if _is(module, RECONSTRUCT):
            attributes = _dict(module.args[0]["state"], prefix)
        elif _is(module, MODULE_DICT):
            attributes = _dict(module.state, prefix)
        else:
            raise Malformed(f"has {prefix!r}, which is no module")
        parameters, buffers, modules = (_dict(attributes.get(key), prefix) for key in ("_parameters", "_buffers", "_modules"))
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

    def add_tensor(self, value: Any, name: str) -> None:
        if value is None:
            return
        if name in self.tensors:
            raise Malformed(f"has two tensors {name!r}")
        if _is(value, PARAMETER) and value.args:
            value = value.args[0]
        try:
            self.tensors[name] = self.tensor(value)
        except Malformed as error:
            raise Malformed(f"has a damaged tensor {name!r}: it {error}") from error

    def tensor(self, value: Any) -> Tensor:
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
        if not count:
            return torch.empty(tuple(size), dtype=dtype)
        # Copied as bytes first: the file does not align its tensors.
        return torch.frombuffer(raw, dtype=torch.uint8).clone().view(dtype).as_strided(size, stride, offset).contiguous()

    def charge(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise Malformed("brings all tensors to more bytes than the file has")


def read_storage(data: memoryview) -> tuple[memoryview, torch.dtype]:
    """The raw values (a view of `data`) and type of a storage in torch's legacy format: five pickles, a count, little-endian values.

    torch.load(weights_only=True) reads the same, but can be kept busy for ever (a nested tuple as a dictionary key). Raises Malformed.
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


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Call) and value.name == name


def _dict(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"has a damaged module {where!r}")
    return value


def _sizes(values: Any) -> bool:
    return isinstance(values, tuple | list) and len(values) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**48 for n in values)


def _plain(value: Any, depth: int = 0) -> Any:
    """Configuration values as JSON has them; anything else as the name of its kind."""
    if isinstance(value, str | int | float | None):
        return value
    if depth < 2 and isinstance(value, tuple | list) and len(value) <= 64:
        return [_plain(v, depth + 1) for v in value]
    if depth < 2 and isinstance(value, dict) and len(value) <= 64:
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    return f"<{value.name if isinstance(value, Call) else type(value).__name__}>"


# NVIDIA's argument -> ours, and the values it may take: (type, lowest, highest), or the choices. The bounds keep a damaged file from asking
# for a network that takes hours to build.
OPTIONS: dict[str, tuple[str, tuple]] = {
    "img_resolution": ("img_resolution", (int, 1, 4096)),
    "img_channels": ("img_channels", (int, 1, 1024)),
    "label_dim": ("label_dim", (int, 0, 10**6)),
    "sigma_data": ("sigma_data", (float, 1e-6, 1e6)),
    "augment_dim": ("augment_dim", (int, 0, 1024)),
    "model_channels": ("model_channels", (int, 1, 8192)),
    "channel_mult": ("channel_mult", (list, 1, 64)),
    "channel_mult_emb": ("emb_mult", (int, 1, 64)),
    "num_blocks": ("num_blocks", (int, 1, 32)),
    "attn_resolutions": ("attn_resolutions", (list, 0, 4096)),
    "dropout": ("dropout", (float, 0.0, 1.0)),
}
SONG_OPTIONS: dict[str, tuple[str, tuple]] = {
    "embedding_type": ("embedding", ("positional", "fourier")),
    "channel_mult_noise": ("noise_mult", (int, 1, 64)),
    "encoder_type": ("encoder", ("standard", "residual")),
    "resample_filter": ("fir", (list, 0, 4096)),
    "decoder_type": ("", ("standard",)),
}
SONG_DEFAULTS = {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard", "resample_filter": [1, 1]}
IGNORED = {"model_type", "use_fp16", "sigma_min", "sigma_max", "label_dropout"}
"""Not part of the architecture."""


def _edm_config(class_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    unet = kwargs.get("model_type", "DhariwalUNet") if class_name == "EDMPrecond" else None
    if unet not in ("SongUNet", "DhariwalUNet"):
        raise Malformed(f"holds a network of class {class_name}{f' around {unet!r:.100}' if unet else ''}, which d2o cannot run yet")
    options = OPTIONS
    config: dict[str, Any] = {"arch": "adm"}
    if unet == "SongUNet":
        options, kwargs = {**OPTIONS, **SONG_OPTIONS}, {**SONG_DEFAULTS, **kwargs}
        config["arch"] = "ncsnpp" if kwargs["encoder_type"] == "residual" else "ddpmpp"
    for key in ("img_resolution", "img_channels"):
        if key not in kwargs:
            raise Malformed(f"holds a {unet} without {key!r}")
    for key, value in kwargs.items():
        if key in IGNORED:
            continue
        if key not in options:
            raise Malformed(f"holds a {unet} with option {key!r:.100}, which d2o does not know")
        ours, allowed = options[key]
        if not _allowed(value, allowed):
            raise Malformed(f"holds a {unet} with {key} = {value!r:.100}, which d2o does not support")
        if ours:
            config[ours] = value
    return config


def _allowed(value: Any, allowed: tuple) -> bool:
    kind, *bounds = allowed
    if kind is list:
        return isinstance(value, list) and len(value) <= 8 and all(_allowed(v, (int, *bounds)) for v in value)
    if kind is int:
        return type(value) is int and bounds[0] <= value <= bounds[1]
    if kind is float:
        return type(value) in (int, float) and bounds[0] <= value <= bounds[1]
    return value in allowed
