"""Batch normalisation whose batch is stated, instead of being whatever a process happens to see at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.networks.minibatch_std import Gather, group_size

EPS, MOMENTUM = 1e-5, 0.1


class PooledBatchNorm(nn.Module):
    """x [B, C, H, W] -> the same, each channel normalised by mean and variance of `pool` samples in a row (None: of the
    whole batch; a pool that does not divide it: the largest divisor below), then times `weight` plus `bias` [C].

    In a row, so that micro-batches and processes which have whole pools need nothing of the others. Of pools that reach
    over processes the moments are put together by `gather`; each process then has to have its whole share in x.
    Differentiable twice. In eval mode by the running statistics. These move in `settle` alone, once an iteration and by
    MOMENTUM: towards the mean over all pools that were seen since, of all processes, so that they are the same for any
    division of the batch. Nothing in training reads them.
    """

    running_mean: Tensor
    running_var: Tensor
    total: Tensor
    pools: Tensor

    def __init__(self, channels: int, pool: int | None):
        super().__init__()
        self.pool = pool
        self.gather: Gather | None = None  # the loop sets it where there are several processes
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("total", torch.zeros(2, channels), persistent=False)  # of means and variances since then
        self.register_buffer("pools", torch.zeros(()), persistent=False)  # how many those are

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
        world, n = 1 if self.gather is None else self.gather.world, len(x)
        size = group_size(self.pool, n * world)
        if n % size:
            return self._across(x, size, math.gcd(n, size))
        done = [self._one(part) for part in x.split(size)]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _one(self, x: Tensor) -> Tensor:
        """A pool that is here as a whole, by torch's kernel."""
        moments = torch.zeros_like(self.total)
        out = F.batch_norm(x, moments[0], moments[1], self.weight, self.bias, True, 1.0, EPS)  # which it sets
        self._note(moments, 1)
        return out

    def _across(self, x: Tensor, size: int, part: int) -> Tensor:
        """Pools of which others have a share: from the moments of `part` samples each, of all processes."""
        assert self.gather is not None
        y = x.unflatten(0, (-1, part))
        own = torch.stack([y.mean((1, 3, 4)), y.var((1, 3, 4), correction=0)], 1)  # [parts, 2, C]
        mean, var = self.gather(own).unflatten(0, (-1, size // part)).unbind(2)  # [pools, parts of a pool, C]
        var, mean = var.mean(1) + mean.var(1, correction=0), mean.mean(1)
        parts = torch.arange(len(y), device=x.device) + self.gather.rank * len(y)
        mean, var = mean[parts * part // size], var[parts * part // size]
        count = size * x.shape[2] * x.shape[3]
        self._note(torch.stack([mean, var * (count / max(count - 1, 1))], 1).detach().sum(0), len(y))
        scale = self.weight * (var + EPS).rsqrt()
        y = (y - mean[:, None, :, None, None]) * scale[:, None, :, None, None] + self.bias[:, None, None]
        return y.flatten(0, 1)

    @torch.no_grad()
    def _note(self, moments: Tensor, pools: int) -> None:
        self.total.add_(moments)
        self.pools.add_(pools)


@torch.no_grad()
def settle_norms(network: nn.Module) -> None:
    """Move the running statistics of all `PooledBatchNorm`s of a network; all processes call this, together."""
    norms = [part for part in network.modules() if isinstance(part, PooledBatchNorm)]
    if not norms:
        return
    seen = torch.cat([(norm.total / norm.pools.clamp(min=1)).flatten() for norm in norms])
    if (gather := norms[0].gather) is not None:
        seen = gather(seen[None]).mean(0)
    for norm, found in zip(norms, seen.split([norm.total.numel() for norm in norms])):
        mean, var = found.unflatten(0, (2, -1))
        by = MOMENTUM * (norm.pools > 0)  # stays on the device
        norm.running_mean.lerp_(mean, by)
        norm.running_var.lerp_(var, by)
        norm.total.zero_()
        norm.pools.zero_()
