"""VGG-16 as a classifier of images or of latents: what the trunk of LatentLPIPS is trained as (Kang et al. 2024,
appendix B.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from d2o.networks.config import Config
from d2o.networks.latent_vgg import WIDTH, LatentVGG

MOMENTUM = 0.1
"""Share of the newest statistics in the running ones of batch normalisation, as torch has it."""


class LatentClassifier(nn.Module):
    """forward(x [n, channels, h, w], h and w >= 4 (`pixels`: 32)) -> logits [n, classes].

    `trunk` is LatentVGG with its `batch_norm`, `width` and `pixels`; its last map is averaged to `side` x `side`, and
    two hidden layers of `hidden` numbers follow (VGG-16: 7 and 4096), with dropout while it is trained.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        batch_norm: bool = True,
        pixels: bool = False,
        width: int = WIDTH,
        hidden: int = 4096,
        side: int = 7,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.config: Config = {
            "arch": "latent_classifier",
            "channels": channels,
            "classes": classes,
            "batch_norm": batch_norm,
            "pixels": pixels,
            "width": width,
            "hidden": hidden,
            "side": side,
            "dropout": dropout,
        }
        self.channels, self.classes = channels, classes
        self.trunk = LatentVGG(channels, batch_norm, width=width, pixels=pixels)
        self.average = nn.AdaptiveAvgPool2d(side)
        self.statistics: RunningStatistics | None = None  # set for a training iteration
        self.classifier = nn.Sequential(
            nn.Linear(self.trunk.widths[-1] * side**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # without batch normalisation the signal has to survive 13 of them
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x) if self.statistics is None else self.statistics.over_pools(self.logits, x)

    def logits(self, x: Tensor) -> Tensor:
        return self.classifier(self.average(self.trunk(x)[-1]).flatten(1))


class RunningStatistics:
    """What the batch normalisations of a network see in one iteration: `pool` samples are normalised together, and the
    running statistics move once, by the mean over all pools, so that micro-batches and processes change nothing."""

    def __init__(self, network: nn.Module, pool: int):
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0  # a pool's own statistics are then what lies in the buffers after it
        self.buffers = [cast(Tensor, b) for norm in norms for b in (norm.running_mean, norm.running_var)]
        self.before = [buffer.clone() for buffer in self.buffers]
        self.sums = [torch.zeros_like(buffer) for buffer in self.buffers]
        self.pool, self.pools = pool, 0

    def over_pools(self, logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """logits(x), pool by pool."""
        found = []
        for part in x.split(self.pool):
            found.append(logits(part))
            self.pools += 1
            for total, buffer in zip(self.sums, self.buffers, strict=True):
                total += buffer
        return torch.cat(found)

    @torch.no_grad()
    def finish(self, everywhere: Callable[[Tensor], Tensor]) -> None:
        """Move the running statistics; `everywhere` gives the mean over processes."""
        for buffer, before, total in zip(self.buffers, self.before, self.sums, strict=True):
            buffer.copy_(torch.lerp(before, everywhere(total / self.pools), MOMENTUM))
