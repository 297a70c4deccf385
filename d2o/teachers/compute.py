"""How a network is run (batch, threads, precision, compilation): what changes the last bits of its output, and nothing
else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import nn

from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject
from d2o.networks.processor import AUTO, PRECISIONS, chosen_precision, prefers_channels_last, to_channels_last
from d2o.teachers.base import Teacher

BATCH = 256
COMPILES = {"none": None, "default": "default", "graphs": "reduce-overhead"}


@dataclass(frozen=True)
class Compute:
    """How the network is run, which changes the last bits of its output and nothing else. `batch`: samples per teacher
    call (256); `threads` of torch (the process's own number); `precision` fp32, bf16 or fp16 (autocast), or auto: bf16
    where the processor computes in it; `channels_last` order (None: where that is faster); `compile` none, default, or
    graphs (CUDA graphs)."""

    batch: int | None = None
    threads: int | None = None
    precision: str = "fp32"
    channels_last: bool | None = None
    compile: str = "none"

    def check(self) -> None:
        """UserError: a number below 1, an unknown precision or way to compile."""
        for name in ("batch", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.precision not in (*PRECISIONS, AUTO):
            raise unknown("precision", self.precision, (*PRECISIONS, AUTO))
        if self.compile not in COMPILES:
            raise unknown("compile", self.compile, COMPILES)

    @property
    def asked(self) -> list[str]:
        """What was asked for, other than the defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def describe(self, most: int, device: torch.device, network: object = None) -> JsonObject:
        """As it is recorded, with what is chosen for that network and with what else the last bits depend on. There are
        no batches larger
        than `most`. UserError: as `check`."""
        self.check()
        processor = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        )
        batch, threads = min(self.batch or BATCH, most), self.threads or torch.get_num_threads()
        record = {
            "batch": batch,
            "threads": threads,
            "device": device.type,
            "torch": torch.__version__,
            "processor": processor,
        }
        # Only what departs from the plain way is recorded, so that records of an older d2o stay what they are.
        precision = chosen_precision(self.precision, device)
        record |= {"precision": precision} if precision != "fp32" else {}
        ordered = prefers_channels_last(network, device) if self.channels_last is None else self.channels_last
        record |= {"channels_last": True} if ordered else {}
        record |= {"compile": self.compile} if self.compile != "none" else {}
        return record


def tune(teacher: Teacher, recorded: JsonObject) -> None:
    """Have the teacher run as recorded: precision, memory format, compilation. Changes its network; take its
    fingerprint before."""
    teacher.dtype = tune_network(teacher.network, recorded) or teacher.dtype
    if (mode := COMPILES[recorded.get("compile", "none")]) is not None and teacher.call is teacher.network:
        teacher.call = torch.compile(teacher.network, mode=mode, dynamic=False)
    if teacher.guide is not None:
        tune(teacher.guide, recorded)


def changes(recorded: JsonObject) -> bool:
    """Whether `tune` changes a teacher: its weights' precision or order, or what is called in the network's place."""
    return any(recorded.get(name) for name in ("precision", "channels_last", "compile"))


def tune_network(network: nn.Module, recorded: JsonObject) -> torch.dtype | None:
    """Weights in the recorded precision and memory format; the type to call the network under (autocast), None for
    fp32."""
    dtype = PRECISIONS[recorded.get("precision", "fp32")]
    if dtype is not None:
        # Autocast would convert these weights anew in every call; norms and embeddings stay float32, as under autocast.
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(dtype)
    if recorded.get("channels_last"):
        to_channels_last(network)
    return dtype


def join_compute(
    recorded: JsonObject, mine: JsonObject, out: str, say: Callable[[str], None], asked: Sequence[str]
) -> JsonObject:
    """The recorded way to compute, which everyone who works on `out` takes; says so where `asked` names something that
    is otherwise here.

    UserError: begun on another kind of device.
    """
    if recorded["device"] != mine["device"]:
        was, now = recorded["device"], mine["device"]
        raise UserError(
            f"{out} was begun on {was}; this would go on with {now}", f"give --device {was}, or choose another --out"
        )
    plain = {"precision": "fp32", "channels_last": False, "compile": "none"}
    was, now = {**plain, **recorded}, {**plain, **mine}
    names = [*asked, *(name for name in plain if name not in asked)]
    if fixed := [f"{name} {was[name]}" for name in names if was[name] != now[name]]:
        say(f"{out} was begun with {', '.join(fixed)}; it goes on with that")
    if other := [
        f"{name} {recorded[name]} (here {mine[name]})"
        for name in ("torch", "processor")
        if recorded[name] != mine[name]
    ]:
        say(f"{out} was begun with {', '.join(other)}: what is made here may differ in the last digits")
    return recorded


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Compute with that many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
