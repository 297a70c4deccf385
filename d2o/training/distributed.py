"""Several processes: torchrun starts them, torch.distributed connects them. One process is the same code with world size 1."""

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


BUCKET = 2**23
"""Elements of gradients that are exchanged at once: few enough to copy in a moment, enough to fill the line."""


def average(gradients: list[Tensor], world: int) -> None:
    """Replace each by its mean over the processes, which have to bring the same ones.

    Here and not in DistributedDataParallel: that counts on one backward pass a step with a gradient for every parameter, and methods with a
    critic have passes of a few parameters (R1), several of one network in an iteration, and updates of one network between two of another.
    """
    if world == 1:
        return
    bucket: list[Tensor] = []
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        if i + 1 == len(gradients) or sum(g.numel() for g in bucket) >= BUCKET:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= world
            pieces = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [piece.view(g.shape) for piece, g in zip(pieces, bucket, strict=True)])
            bucket = []


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
