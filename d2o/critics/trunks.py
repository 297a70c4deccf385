"""Critics that begin with all of a pretrained network, which is trained on with them (Zheng & Yang 2024, table 1a): the
VGG-16 baseline, and one that judges at several scales, as LPIPS compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.augment.diffaug import SampleDraws, diffaugment
from d2o.features import Features
from d2o.features.base import release
from d2o.losses.perceptual import unit

POOLED = 2
"""VGG-16 ends in a pooling over as many pixels, after the last map that LPIPS looks at."""


class _OnTrunk(nn.Module):
    """A network of `d2o.features`, trained on unless it is `frozen`. `shape` (C, H, W) of the images; `diffaug`:
    DiffAugment where a call brings `draws`."""

    def __init__(self, trunk: Features, shape: tuple[int, ...], frozen: bool = False, diffaug: bool = False):
        super().__init__()
        self.trunk, self.diffaug = trunk, diffaug
        blank = torch.zeros(1, *shape, device=next(trunk.buffers()).device)
        with torch.no_grad():
            maps = trunk.maps(blank) if frozen else release(trunk, blank)
        self.widths = [y.shape[1] for y in maps]

    def look(self, x: Tensor, draws: SampleDraws | None) -> Sequence[Tensor]:
        """The trunk's maps."""
        return self.trunk.maps(diffaugment(x, draws) if self.diffaug and draws is not None else x)

    def settle(self) -> None:
        """Nothing moves at the end of an iteration."""


class VGG16Critic(_OnTrunk):
    """critic(x [B, C, H, W] in [-1, 1], labels or None, draws or None) -> [logits [B, 1]]: the trunk's last map, pooled
    as VGG-16 ends, averaged over places; linear, SiLU, linear without bias. Labels are not looked at.

    The trunk is VGG-16 with LPIPS's scaling of its input; others stand in for it. Weights of the last layer begin as
    N(0, 1 / inputs).
    """

    def __init__(self, trunk: Features, shape: tuple[int, ...], frozen: bool = False, diffaug: bool = False):
        super().__init__(trunk, shape, frozen, diffaug)
        width = self.widths[-1]
        self.hidden, self.output = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.output.weight, std=width**-0.5)

    def forward(self, x: Tensor, labels: Tensor | None = None, draws: SampleDraws | None = None) -> list[Tensor]:
        last = self.look(x, draws)[-1]
        if min(last.shape[2:]) >= POOLED:
            last = F.max_pool2d(last, POOLED)
        return [self.output(F.silu(self.hidden(last.mean((2, 3)))))]


class LpipsCritic(_OnTrunk):
    """critic(x [B, C, H, W] in [-1, 1], labels or None, draws or None) -> logits of each of the trunk's maps [B, h w]:
    a linear combination of its channels, of unit length at each place. Labels are not looked at.

    Its code was not published: the maps are those that LPIPS compares, five of VGG-16, and their losses are added.
    """

    def __init__(self, trunk: Features, shape: tuple[int, ...], frozen: bool = False, diffaug: bool = False):
        super().__init__(trunk, shape, frozen, diffaug)
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in self.widths)

    def forward(self, x: Tensor, labels: Tensor | None = None, draws: SampleDraws | None = None) -> list[Tensor]:
        maps = self.look(x, draws)
        return [head(unit(y)).flatten(1) for head, y in zip(self.heads, maps, strict=True)]
