"""What several processes see together, put together in the middle of a network (a critic's groups)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from d2o.networks.minibatch_std import MinibatchStd
from d2o.networks.pooled_norm import PooledBatchNorm


class AllProcesses:
    """x [n, ...] of each process -> [world * n, ...] of all, in their order (`d2o.networks.minibatch_std.Gather`).

    A gradient of it goes back to whoever brought the sample, from all processes; differentiable any number of times.
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world

    def __call__(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.rank, self.world)


def gather_pools(networks: Iterable[nn.Module], rank: int, world: int) -> None:
    """Let the parts of the networks that look at several samples see those of the global batch."""
    for network in networks:
        for part in network.modules():
            if isinstance(part, MinibatchStd):
                part.in_a_row = True
            if isinstance(part, MinibatchStd | PooledBatchNorm):
                part.gather = AllProcesses(rank, world) if world > 1 else None


class _Place(FunctionCtx):
    """What the two ways remember of a call: the process, and how many there are."""

    place: tuple[int, int]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Place, x: Tensor, rank: int, world: int) -> Tensor:
        ctx.place = rank, world
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: _Place, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Own.apply(gradient, *ctx.place), None, None


class _Own(torch.autograd.Function):
    """The other way: of each process's [world * n, ...] the sum, and of that this process's [n, ...]."""

    @staticmethod
    def forward(ctx: _Place, x: Tensor, rank: int, world: int) -> Tensor:
        ctx.place = rank, world
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world)[rank].contiguous()

    @staticmethod
    def backward(ctx: _Place, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(gradient, *ctx.place), None, None
