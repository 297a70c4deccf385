"""The head that learns from two distances which copy people find nearer (Zhang et al. 2018); only training needs it."""

from __future__ import annotations

from torch import Tensor, nn


class RankingHead(nn.Module):
    """forward(inputs [n, 5] of `d2o.losses.two_afc.ranking_inputs`) -> logits [n] of "the second copy is nearer"."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)[:, 0]
