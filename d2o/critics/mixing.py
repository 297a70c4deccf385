"""The frozen random projections between a projected critic's backbone and its heads (Sauer et al. 2021, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.networks.frozen_conv import hold_convolutions

WIDTH = 64
ACROSS, MIXED = (1, 2, 4, 8), (1, 1, 2, 4)
"""Of it, the channels of the four levels after cross-channel mixing, and those of the maps that heads are given."""

N = TypeVar("N", bound=nn.Module)


class Mixing(nn.Module):
    """Four maps [B, c, h, w] of a backbone, fine first -> four of `MIXED` times `width` channels, of about twice their
    sizes.

    Cross-channel mixing: a 1x1 convolution of each level. Cross-scale mixing, from the coarsest on: what comes from
    below is added, the sum resized (bilinear, corners aligned) to the next finer level's size, the finest one to twice
    its own, and mixed by another 1x1 convolution. `grid`: the maps are grids of tokens, all of one size, of which
    random convolutions first make a pyramid. Weights are drawn by `seed` as torch draws a convolution's, and are
    buffers: stored, never trained.
    """

    def __init__(self, channels: Sequence[int], grid: bool, seed: int, width: int = WIDTH):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pyramid = as_buffers(pyramid(channels[0])) if grid else None
            if grid:
                channels = [channels[0] // share for share in (8, 4, 2, 1)]
            wide = [width * times for times in ACROSS]
            self.across_channels = as_buffers(nn.ModuleList(map(conv1x1, channels, wide)))
            self.across_scales = as_buffers(nn.ModuleList(conv1x1(n, width * times) for n, times in zip(wide, MIXED)))
        hold_convolutions(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if self.pyramid is not None:
            maps = [layer(x) for layer, x in zip(self.pyramid, maps, strict=True)]
        mixed = [layer(x) for layer, x in zip(self.across_channels, maps, strict=True)]
        found: list[Tensor] = []
        for level in reversed(range(len(mixed))):
            x = mixed[level] + found[0] if found else mixed[level]
            size = mixed[level - 1].shape[2:] if level else [2 * side for side in x.shape[2:]]
            if x.shape[2:] != torch.Size(size):
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
            found.insert(0, self.across_scales[level](x))
        return found


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def pyramid(width: int) -> nn.ModuleList:
    """Of four grids of tokens of that width, maps of 4, 2, 1 and 1/2 times their size."""
    eighth, quarter, half = width // 8, width // 4, width // 2
    return nn.ModuleList(
        [
            nn.Sequential(conv1x1(width, eighth), nn.ConvTranspose2d(eighth, eighth, 4, stride=4)),
            nn.Sequential(conv1x1(width, quarter), nn.ConvTranspose2d(quarter, quarter, 2, stride=2)),
            nn.Sequential(conv1x1(width, half)),
            nn.Sequential(conv1x1(width, width), nn.Conv2d(width, width, 3, stride=2, padding=1)),
        ]
    )


def as_buffers(network: N) -> N:
    """The network, its parameters turned into buffers of its state: stored with it, and never trained."""
    for module in network.modules():
        for name, parameter in [*module._parameters.items()]:
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return network
