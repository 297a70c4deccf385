"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from d2o.networks.copying import follow


class EMA:
    """beta per update, of which the loop makes one an iteration: `decay` as it is, or 0.5^(batch / h) with h =
    min(half_life, ramp * images seen) (Karras et al. 2022, appendix F.2); with neither, or before `start` images, the
    copy follows the weights at once. Buffers are copied. Parameters may be the network's own (a LoRA's base).

    `copied`: the copy to take instead of a new one, of a network that cannot be copied any more (it is sharded).
    """

    def __init__(
        self,
        network: nn.Module,
        half_life: float | None = None,
        decay: float | None = None,
        ramp: float | None = 0.05,
        start: int = 0,
        copied: nn.Module | None = None,
    ):
        self.half_life, self.decay, self.ramp, self.start = half_life, decay, ramp, start
        self.network = (copy.deepcopy(network) if copied is None else copied).eval().requires_grad_(False)

    def beta(self, images: int, batch: int) -> float:
        if images < self.start:
            return 0.0
        if self.decay is not None:
            return self.decay
        if self.half_life is None:
            return 0.0
        h = self.half_life if self.ramp is None else min(self.half_life, self.ramp * images)
        return 0.5 ** (batch / max(h, 1e-8))

    @torch.no_grad()
    def update(self, network: nn.Module, images: int, batch: int) -> None:
        """`images` seen before this update, `batch` images in it."""
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        moving = [pair for pair in pairs if pair[0] is not pair[1]]
        follow([mine for mine, _ in moving], [theirs for _, theirs in moving], 1 - self.beta(images, batch))
        for a, b in zip(self.network.buffers(), network.buffers(), strict=True):
            a.copy_(b)
