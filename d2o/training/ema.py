"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """beta per update, of which the loop makes one an iteration: `decay` as it is, or 0.5^(batch / h) with h =
    min(half_life, ramp * images seen) (Karras et al. 2022, appendix F.2); with neither, the copy follows the weights at
    once. Buffers are copied."""

    def __init__(
        self, network: nn.Module, half_life: float | None = None, decay: float | None = None, ramp: float | None = 0.05
    ):
        self.half_life, self.decay, self.ramp = half_life, decay, ramp
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def beta(self, images: int, batch: int) -> float:
        if self.decay is not None:
            return self.decay
        if self.half_life is None:
            return 0.0
        h = self.half_life if self.ramp is None else min(self.half_life, self.ramp * images)
        return 0.5 ** (batch / max(h, 1e-8))

    @torch.no_grad()
    def update(self, network: nn.Module, images: int, batch: int) -> None:
        """`images` seen before this update, `batch` images in it."""
        beta = self.beta(images, batch)
        mine = [p.detach() for p in self.network.parameters()]
        theirs = [p.detach() for p in network.parameters()]
        if beta == 0:
            torch._foreach_copy_(mine, theirs)
        else:
            torch._foreach_lerp_(mine, theirs, 1 - beta)
        for a, b in zip(self.network.buffers(), network.buffers(), strict=True):
            a.copy_(b)
