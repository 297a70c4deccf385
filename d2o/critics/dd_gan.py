"""The critic of denoising diffusion GANs: is x_t a real step back from x_{t+1}?

Xiao et al. 2022, section 4 and appendix C; the small network of CIFAR-10 and the large one of 256 px images are two
cases of one rule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.networks.fir import down2, fir_taps
from d2o.networks.minibatch_std import MinibatchStd
from d2o.networks.ncsnpp_blocks import SQRT_HALF, LabelEmbedding, TimeEmbedding, dense, fan_out_uniform_

NEAR_ZERO = 1e-10
"""Gain of layers that start at almost 0."""
LAST = 4
"""Side of the smallest maps, pixels."""
LARGE_FROM = 128
"""Resolution from which `kind` "auto" is "large"."""
GROUP = 4
"""Images that minibatch standard deviation looks at together."""


def conv(inputs: int, outputs: int, kernel: int, gain: float = 1.0, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
    fan_out_uniform_(layer, gain)
    return layer


def critic_widths(img_resolution: int, kind: str, width: int) -> list[tuple[int, bool]]:
    """(output channels, halves the image?) of every block.

    "small": one block of 2 width channels at full size, then halvings to 4, 8, 8, ... times width down to 4 pixels;
    "large": halvings only. 32 px small: 2, 4, 8, 8; 256 px large: 4, 8, 8, 8, 8, 8.
    """
    halvings = 0
    while img_resolution >> halvings > LAST and img_resolution % 2 ** (halvings + 1) == 0:
        halvings += 1
    blocks = [(2 * width, False)] if kind == "small" else []
    return blocks + [(4 * width if i == 0 else 8 * width, True) for i in range(halvings)]


class DownBlock(nn.Module):
    """Leaky ReLU, conv, + time, leaky ReLU, (halving), conv; plus a 1x1 shortcut of x; over sqrt 2. x [B, in, H, W],
    temb [B, E]."""

    def __init__(self, in_channels: int, out_channels: int, emb: int, down: bool):
        super().__init__()
        self.down = down
        self.conv0 = conv(in_channels, out_channels, 3)
        self.time = dense(emb, out_channels)
        self.conv1 = conv(out_channels, out_channels, 3, NEAR_ZERO)
        self.skip = conv(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, temb: Tensor, taps: Tensor) -> Tensor:
        y = self.conv0(F.leaky_relu(x, 0.2)) + self.time(temb)[:, :, None, None]
        y = F.leaky_relu(y, 0.2)
        if self.down:
            x, y = down2(x, taps), down2(y, taps)
        return (self.conv1(y) + self.skip(x)) * SQRT_HALF


class DDGANCritic(nn.Module):
    """forward(x_t [B, C, R, R], t [B] int64, x_{t+1} [B, C, R, R], labels [B] or None) -> logits [B].

    `kind`: "small" (the paper's at 32 px), "large" (at 256 px), or "auto": large from 128 px. `width`: half of the
    first layer's channels (64);
    `temb`: width of the time embedding. `classes` > 0 (ours) adds an embedding of the label to that of t. Group
    statistics make a logit depend on the other images of the batch.
    """

    taps: Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        kind: str = "auto",
        width: int = 64,
        temb: int = 256,
        classes: int = 0,
    ):
        super().__init__()
        self.config = {
            "arch": "ddgan_critic",
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "kind": kind,
            "width": width,
            "temb": temb,
            "classes": classes,
        }
        if kind == "auto":
            kind = "large" if img_resolution >= LARGE_FROM else "small"
        if kind not in ("small", "large"):
            raise ValueError(f"kind must be auto, small or large, not {kind!r}")
        self.classes = classes
        self.time, self.time0, self.time1 = TimeEmbedding(temb), dense(temb, temb), dense(temb, temb)
        self.label = LabelEmbedding(classes, temb) if classes else None
        self.input = conv(2 * img_channels, 2 * width, 1)
        channels, blocks = 2 * width, []
        for outputs, down in critic_widths(img_resolution, kind, width):
            blocks.append(DownBlock(channels, outputs, temb, down))
            channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.spread = MinibatchStd(GROUP)
        self.final = conv(channels + 1, channels, 3, NEAR_ZERO if kind == "small" else 1.0)
        self.output = dense(channels, 1)
        self.register_buffer("taps", fir_taps(), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, x_next: Tensor, labels: Tensor | None = None) -> Tensor:
        temb = self.time1(F.leaky_relu(self.time0(self.time(t).to(x_t.dtype)), 0.2))
        if self.label is not None:
            assert labels is not None
            temb = temb + self.label(labels)
        temb = F.leaky_relu(temb, 0.2)
        x = self.input(torch.cat([x_t, x_next], dim=1))
        for block in self.blocks:
            x = block(x, temb, self.taps)
        x = F.leaky_relu(self.final(self.spread(x)), 0.2)
        return self.output(x.sum((2, 3)))[:, 0]
