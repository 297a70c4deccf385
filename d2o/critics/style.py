"""StyleGAN2's critic, which can be told a time t."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d2o.errors import UserError, unknown
from d2o.networks.edm_blocks import PositionalEmbedding
from d2o.networks.minibatch_std import MinibatchStd
from d2o.networks.style import channel_table
from d2o.networks.style_layers import EqualizedConv2d, EqualizedLinear

CRITIC_BLOCKS = ("orig", "resnet")
MBSTD_GROUP = 32
"""Images that minibatch standard deviation looks at together, where nothing else is said."""
CRITIC_TIMES = ("none", "block_add", "cmap")


class StyleCriticBlock(nn.Module):
    """Two 3x3 convolutions, the second to half the size; "resnet" adds a 1x1 shortcut, both branches times
    sqrt(1/2)."""

    def __init__(self, in_channels: int, out_channels: int, residual: bool, time_dim: int):
        super().__init__()
        self.conv0 = EqualizedConv2d(in_channels, in_channels, 3)
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, down=True)
        self.skip = (
            EqualizedConv2d(in_channels, out_channels, 1, down=True, bias=False, activate=False) if residual else None
        )
        self.time = EqualizedLinear(time_dim, in_channels) if time_dim else None

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        y = self.conv0(x, None if self.time is None else self.time(emb))
        if self.skip is None:
            return self.conv1(y)
        return self.conv1(y, gain=math.sqrt(0.5)) + self.skip(x, gain=math.sqrt(0.5))


class StyleCritic(nn.Module):
    """(x [B, img_channels, R, R], t, labels) -> logits [B], high for real.

    `blocks` "orig" (SPI-GAN's CIFAR-10) or "resnet" (256 px); channels as in the synthesis network. At 4x4: minibatch
    standard deviation over groups of `mbstd_group` (None: the batch; 0: none), a 3x3 convolution, two fully connected
    layers.
    `time`: how t in [0, 1] enters (SPI-GAN does not say). Its embedding is (cos, sin)(time_scale t 10000^(-i/(n-1))),
    `time_dim` values, then two fully connected layers with a leaky ReLU between. "block_add": a linear layer per block
    adds it to the bias of the block's first convolution;
    "cmap": the logit is the product of the last layer's outputs, `cmap_dim`, with it, over sqrt(cmap_dim). "none": t is
    ignored. `label_dim` classes add an embedding of the label to that projection, in every mode.
    UserError: an unknown mode, or t or labels missing.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        blocks: str = "orig",
        base: int = 32768,
        max_channels: int = 512,
        mbstd_group: int | None = MBSTD_GROUP,
        time: str = "block_add",
        time_scale: float = 1000.0,
        time_dim: int = 512,
        label_dim: int = 0,
        cmap_dim: int = 512,
    ):
        super().__init__()
        if blocks not in CRITIC_BLOCKS:
            raise unknown("network.blocks", blocks, CRITIC_BLOCKS)
        if time not in CRITIC_TIMES:
            raise unknown("network.time", time, CRITIC_TIMES)
        self.config = {
            "arch": "style_critic",
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "blocks": blocks,
            "base": base,
            "max_channels": max_channels,
            "mbstd_group": mbstd_group,
            "time": time,
            "time_scale": time_scale,
            "time_dim": time_dim,
            "label_dim": label_dim,
            "cmap_dim": cmap_dim,
        }
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        if time != "none" and (time_dim < 4 or time_dim % 2):
            raise UserError(
                f"network.time_dim: the embedding of time needs an even number of at least 4 values, not {time_dim}"
            )
        self.time, self.time_scale = time, time_scale
        self.channels = channel_table(img_resolution, base, max_channels)
        self.projection = cmap_dim if label_dim or time == "cmap" else 0
        if time != "none":
            self.time_embedding = PositionalEmbedding(time_dim, endpoint=True)
            self.time_layer0 = EqualizedLinear(time_dim, time_dim, activate=True)
            self.time_layer1 = EqualizedLinear(time_dim, cmap_dim if time == "cmap" else time_dim)
        self.label_layer = EqualizedLinear(label_dim, cmap_dim, bias=False) if label_dim else None
        self.from_image = EqualizedConv2d(img_channels, self.channels[img_resolution], 1)
        self.blocks = nn.ModuleList(
            StyleCriticBlock(
                self.channels[res], self.channels[res // 2], blocks == "resnet", time_dim if time == "block_add" else 0
            )
            for res in sorted(self.channels, reverse=True)[:-1]
        )
        last = self.channels[4]
        self.spread = MinibatchStd(mbstd_group)
        self.conv = EqualizedConv2d(last + (mbstd_group != 0), last, 3)
        self.hidden = EqualizedLinear(last * 16, last, activate=True)
        self.output = EqualizedLinear(last, self.projection or 1)

    def forward(self, x: Tensor, t: Tensor | float | None = None, labels: Tensor | None = None) -> Tensor:
        """`t` [B], or one value for all; `labels` int64 [B], -1 for no label."""
        emb = self.embed_time(t, x) if self.time != "none" else None
        shift = emb if self.time == "block_add" else None
        x = self.from_image(x)
        for block in self.blocks:
            x = block(x, shift)
        out = self.output(self.hidden(self.conv(self.spread(x)).flatten(1)))
        if not self.projection:
            return out[:, 0]
        cmap = emb if self.time == "cmap" else None
        if self.label_layer is not None:
            named = self.embed_label(labels, x)
            cmap = named if cmap is None else cmap + named
        assert cmap is not None
        return (out * cmap).sum(1) / math.sqrt(self.projection)

    def embed_time(self, t: Tensor | float | None, x: Tensor) -> Tensor:
        """t -> [B, time_dim] (or cmap_dim)."""
        if t is None:
            raise UserError(f"this critic is conditioned on time ({self.time}) and needs t in [0, 1]")
        t = t.to(x).expand(x.shape[0]) if isinstance(t, Tensor) else x.new_full((x.shape[0],), t)
        return self.time_layer1(self.time_layer0(self.time_embedding(t * self.time_scale)))

    def embed_label(self, labels: Tensor | None, x: Tensor) -> Tensor:
        """Class indices -> [B, cmap_dim], of unit variance at first; zero for -1."""
        if labels is None:
            raise UserError(f"this critic is conditioned on {self.label_dim} classes and needs labels")
        assert self.label_layer is not None
        one_hot = (labels[:, None] == torch.arange(self.label_dim, device=x.device)).to(x.dtype)
        return self.label_layer(one_hot * math.sqrt(self.label_dim))
