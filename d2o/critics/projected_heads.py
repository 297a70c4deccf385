"""The trained heads of a projected critic, one for each of a backbone's four maps."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from d2o.critics.mixing import WIDTH
from d2o.errors import UserError, unknown
from d2o.networks.pooled_norm import PooledBatchNorm
from d2o.networks.spectral_conv import SpectralConv2d
from d2o.networks.style_layers import EqualizedLinear

STEPS = ((1, 1, 2, 4, 8), (1, 2, 4, 8), (2, 4, 8), (4, 8))
"""Times `width`, channels of each head's halvings, finest level first: down to a nominal 8 pixels, of nominally 128,
64, 32, 16."""
NOMINAL = 256
"""Side of images for which these are enough; each time that it is doubled there is a halving more."""
LAST = 4
"""Side of the convolution that makes logits, pixels."""
EMBEDDINGS = ("imagenet_lite0", "learned")
ROWS, TABLE = 1000, 320
"""Classes of ImageNet, and what `imagenet_lite0` has of each: the mean over its images of lite0's last map."""
LEARNED, PRODUCT = 128, 64
"""Widths of a learned embedding, and of the product that logits of a conditional head are."""


class ProjectedHead(nn.Module):
    """x [B, c, h, w], labels [B] -> logits [B, h' w'].

    Halvings (spectrally normalised 4x4 convolution of stride 2, batch norm of `pool` samples, leaky ReLU), then a
    spectrally normalised 4x4 convolution, without bias and padding, to a logit at each place. With `classes` that has
    64 channels, and the logit is their product with a vector made of the label, over 8. `level`: which map it looks at;
    `side`: that map's; small ones are halved less often, so that 4 pixels are left (None: as published). `more`:
    halvings that come before, of as many channels as the map has.
    """

    def __init__(
        self,
        level: int,
        side: int | None,
        pool: int | None,
        classes: int = 0,
        embedding: str = "learned",
        width: int = WIDTH,
        more: int = 0,
    ):
        super().__init__()
        steps = [width * times for times in (*STEPS[level][:1] * more, *STEPS[level])]
        fit = len(steps) - 1 if side is None else min(len(steps) - 1, int(math.log2(side / LAST)))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    SpectralConv2d(before, after, 4, stride=2, padding=1),
                    PooledBatchNorm(after, pool),
                    nn.LeakyReLU(0.2, inplace=True),
                )
                for before, after in pairwise(steps[: fit + 1])
            )
        )
        self.output = SpectralConv2d(steps[fit], PRODUCT if classes else 1, LAST, bias=False)
        self.classes = classes
        if not classes:
            return
        if embedding not in EMBEDDINGS:
            raise unknown("critic.embedding", embedding, EMBEDDINGS)
        if embedding == "imagenet_lite0":
            if classes > ROWS:
                raise UserError(
                    f"critic.embedding: imagenet_lite0 has {ROWS} classes, and the images {classes}", "learned"
                )
            self.embed = nn.Embedding(ROWS, TABLE)
            self.project: nn.Module = EqualizedLinear(TABLE, PRODUCT, activate=True)
        else:
            self.embed = nn.Embedding(classes, LEARNED)
            self.project = nn.Sequential(nn.Linear(LEARNED, PRODUCT), nn.LeakyReLU(0.2))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        out = self.output(self.blocks(x))
        if self.classes:
            if labels is None:
                raise UserError(f"this critic is conditioned on {self.classes} classes and needs labels")
            named = self.project(self.embed(labels.long()))
            out = (out * named[:, :, None, None]).sum(1) / math.sqrt(PRODUCT)
        return out.flatten(1)
