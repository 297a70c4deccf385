"""Minibatch standard deviation (Karras et al. 2018, section 3): how much images that a critic sees together differ, so
that it sees a lack of variety."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Gather(Protocol):
    """Makes of this process's x [n, ...] that of all `world` processes, [world * n, ...] in their order; this one is
    number `rank`. Differentiable any number of times; all processes call it."""

    rank: int
    world: int

    def __call__(self, x: Tensor) -> Tensor: ...


def group_size(group: int | None, batch: int) -> int:
    """Samples that are looked at together, of a batch of so many: `group` (None: all), or if that does not divide the
    batch the largest divisor below it; 1 for a group of 0, which looks at nothing.

    Of a part of the batch that is a multiple of the result, the result is the same.
    """
    size = batch if group is None else max(1, min(group, batch))
    while batch % size:
        size -= 1
    return size


def group_std(x: Tensor, size: int, channels: int = 1, in_a_row: bool = False) -> Tensor:
    """x [B, C, H, W] -> [B, channels]: standard deviation over each `size` samples of every value (sqrt(variance +
    1e-8), biased), averaged over H, W and each of `channels` equal parts of C. Sample i is in group i mod (B / size),
    as in the authors' code; or groups are of samples `in_a_row`."""
    batch, c, h, w = x.shape
    groups = batch // size
    y = x.reshape(groups, size, -1).transpose(0, 1) if in_a_row else x
    y = y.reshape(size, groups, channels, c // channels, h, w)
    y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean((2, 3, 4))
    return y.repeat_interleave(size, dim=0) if in_a_row else y.repeat(size, 1)


def minibatch_std(x: Tensor, group: int | None = None, channels: int = 1) -> Tensor:
    """x [B, C, H, W] -> [B, C + channels, H, W]: with `group_std` of groups of `group_size(group, B)`. A group of 1
    differs by 1e-4 from itself, as identical samples do."""
    return _with(x, group_std(x, group_size(group, len(x)), channels))


class MinibatchStd(nn.Module):
    """`minibatch_std` with one channel, x [B, C, H, W] -> [B, C + 1, H, W]; with a group of 0 x itself.

    In training (`in_a_row`, which the loop sets) the groups are of the global batch, of samples in a row instead of
    the authors' B / size apart: the samples are exchangeable, and so a process or a micro-batch that has whole groups
    needs nothing of the others. Groups that reach over processes are put together by `gather`; then each has to have
    its whole share in x.
    """

    def __init__(self, group: int | None):
        super().__init__()
        self.group = group
        self.in_a_row = False
        self.gather: Gather | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.group == 0:
            return x
        world = 1 if self.gather is None else self.gather.world
        size, n = group_size(self.group, len(x) * world), len(x)
        if self.gather is None or n % size == 0:
            return _with(x, group_std(x, size, in_a_row=self.in_a_row))
        whole = group_std(self.gather(x), size, in_a_row=self.in_a_row)
        return _with(x, whole[self.gather.rank * n :][:n])


def _with(x: Tensor, values: Tensor) -> Tensor:
    return torch.cat([x, values[:, :, None, None].expand(-1, -1, *x.shape[2:])], dim=1)
