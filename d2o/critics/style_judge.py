"""StyleGAN2's critic as one of a clean image alone."""

from __future__ import annotations

from torch import Tensor, nn

from d2o.augment.diffaug import SampleDraws, diffaugment
from d2o.critics.style import StyleCritic


class StyleJudge(nn.Module):
    """critic(x [B, C, R, R] in [-1, 1], labels [B] or None, draws or None) -> [logits [B, 1]].

    One that knows times (SPI-GAN's) is told that of clean images, 1. `diffaug`: DiffAugment where a call brings
    `draws`.
    """

    def __init__(self, critic: StyleCritic, diffaug: bool = False):
        super().__init__()
        self.critic, self.diffaug = critic, diffaug

    def forward(self, x: Tensor, labels: Tensor | None = None, draws: SampleDraws | None = None) -> list[Tensor]:
        seen = diffaugment(x, draws) if self.diffaug and draws is not None else x
        return [self.critic(seen, 1.0, labels)[:, None]]

    def settle(self) -> None:
        """Nothing moves at the end of an iteration."""
