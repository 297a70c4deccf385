"""Several processes: torchrun starts them, torch.distributed connects them. One process is the same code with world
size 1."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from d2o.errors import UserError
from d2o.runtime import worker


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the others (NCCL on CUDA, gloo on the CPU); yields (rank, world size)."""
    rank, world = worker()
    if world == 1:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        yield rank, world
    finally:
        gc.collect()  # DDP's objects hold the group in reference cycles; they go before it does
        dist.destroy_process_group()


DEVICES = ("cpu", "cuda", "mps", "xpu")


def devices() -> list[str]:
    """The devices that this torch can use here, the best one first."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found += [name for name, backend in (("mps", torch.backends.mps), ("xpu", torch.xpu)) if backend.is_available()]
    return [*found, "cpu"]


def pick_device(name: str | None) -> torch.device:
    """`name` (cpu, cuda, cuda:1, ...), or CUDA where there is one, else the CPU; under torchrun each process takes its
    own GPU.

    UserError, in one line: no name of a device, or one that cannot be used here.
    """
    here = devices()
    if name is None:
        name = "cuda" if here[0].startswith("cuda") else "cpu"
    hint = f"usable here: {', '.join(here)}"
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not (index.isascii() and index.isdigit())):
        raise UserError(
            f"--device {name}: no device of d2o's; it knows {', '.join(DEVICES)}, and cuda:N for one of several", hint
        )
    if not any(usable.partition(":")[0] == kind for usable in here):
        raise UserError(f"--device {name}: this torch ({torch.__version__}) finds no {kind.upper()} device", hint)
    number = int(index) if index else int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else 0
    if (f"cuda:{number}" if kind == "cuda" else "cpu") not in here or (kind != "cuda" and number):
        raise UserError(f"--device {name}: there is no {kind} device number {number}", hint)
    device = torch.device("cuda", number) if kind == "cuda" else torch.device(kind)
    try:
        torch.ones(1, device=device).add(1).cpu()
        if kind == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).strip().splitlines()[0][:200]}", hint) from error
    return device


def any_process(flag: bool, device: torch.device, world: int) -> bool:
    """True everywhere if it is true somewhere."""
    if world == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def first_process(work: Callable[[], None], device: torch.device, rank: int, world: int) -> None:
    """Do something on the first process alone. If that refuses it, all end: the first with its own words."""
    error: UserError | None = None
    if rank == 0:
        try:
            work()
        except UserError as refused:
            error = refused
    if any_process(error is not None, device, world):
        raise error or UserError("the first of the processes has refused to start", "its message says why")


def mean_over_processes(value: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(value)
        value = value / world
    return value


def barrier(world: int) -> None:
    if world > 1:
        dist.barrier()
