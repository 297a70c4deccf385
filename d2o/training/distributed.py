"""Several processes: torchrun starts them, torch.distributed connects them. One process is the same code with world size 1."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


def pick_device(name: str | None) -> torch.device:
    """`name` (cpu, cuda, cuda:1), or the best there is; under torchrun each process takes its own GPU."""
    if name and name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        if name:
            raise UserError("--device cuda: this torch finds no CUDA device", "leave --device away, or give cpu")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def wrap(module: nn.Module, device: torch.device, world: int) -> nn.Module:
    """DistributedDataParallel when there are several processes, the module itself otherwise."""
    if world == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)


def any_process(flag: bool, device: torch.device, world: int) -> bool:
    """True everywhere if it is true somewhere."""
    if world == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def mean_over_processes(value: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(value)
        value = value / world
    return value


def barrier(world: int) -> None:
    if world > 1:
        dist.barrier()
