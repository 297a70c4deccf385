"""The parts of the z-conditioned NCSN++: adaptive group norm, BigGAN residual block with FIR resampling, attention, the
two embeddings.

Sources: Song et al. 2021 (NCSN++, "Score-based generative modeling through SDEs", appendix H), Xiao et al. 2022
(denoising diffusion GANs, appendix C). Convolutions, FIR filters [1, 3, 3, 1] and their initialisation are those of the
EDM family's NCSN++.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.networks.edm_blocks import Conv2d, GroupNorm, Init, Linear, PositionalEmbedding

FIR = (1, 3, 3, 1)
SQRT_HALF = math.sqrt(0.5)
ZERO: Init = {"gain": 1e-5}  # nearly, not exactly, 0: as published


@torch.no_grad()
def fan_out_uniform_(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    """Weights uniform within +-sqrt(3 gain / fan_out), bias 0: the initialisation of DD-GAN's own layers."""
    fan_out = layer.weight.shape[0] * math.prod(layer.weight.shape[2:])
    bound = math.sqrt(3 * gain / fan_out)
    layer.weight.uniform_(-bound, bound)
    if layer.bias is not None:
        layer.bias.zero_()


def dense(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    fan_out_uniform_(layer, gain)
    return layer


class TimeEmbedding(nn.Module):
    """t [B] int64 -> (sin, cos) [B, channels] of the bare step number."""

    def __init__(self, channels: int):
        super().__init__()
        self.embed = PositionalEmbedding(channels, endpoint=True)

    def forward(self, t: Tensor) -> Tensor:
        cosine, sine = self.embed(t.to(torch.float32)).chunk(2, dim=1)
        return torch.cat([sine, cosine], dim=1)


class LabelEmbedding(nn.Embedding):
    """Class indices [B] int64 -> [B, channels]; 0 for -1, "no class"."""

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(labels.clamp(min=0)) * (labels >= 0)[:, None]


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are a dense layer of z's embedding [B, zdim], at first about 1 and 0."""

    def __init__(self, channels: int, zdim: int):
        super().__init__()
        self.groups = min(32, channels // 4)
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not divide into {self.groups} groups")
        self.style = dense(zdim, 2 * channels)
        with torch.no_grad():
            self.style.bias[:channels] = 1

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scale, shift = self.style(z)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, F.group_norm(x, self.groups, eps=1e-6), scale)


class ResidualBlock(nn.Module):
    """Norm-SiLU-(resample)-conv, time embedding, norm-SiLU-conv, plus a 1x1 shortcut where shape or channels change;
    over sqrt 2.

    forward(x [B, in, H, W], temb [B, E] after its SiLU, z [B, zdim]) -> [B, out, H', W'].
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, zdim: int, *, up: bool = False, down: bool = False
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm0 = AdaptiveGroupNorm(in_channels, zdim)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, fir=FIR)
        self.time = Linear(emb_channels, out_channels)
        self.norm1 = AdaptiveGroupNorm(out_channels, zdim)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **ZERO)
        self.skip = None
        if in_channels != out_channels or up or down:
            self.skip = Conv2d(in_channels, out_channels, 1, up=up, down=down, fir=FIR)

    def forward(self, x: Tensor, temb: Tensor, z: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x, z))) + self.time(temb)[:, :, None, None]
        y = self.conv1(F.silu(self.norm1(y, z)))
        return (y + (x if self.skip is None else self.skip(x))) * SQRT_HALF


class Attention(nn.Module):
    """Self-attention over the pixels with one head, plus x; over sqrt 2. x [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(channels, 1e-6)
        self.qkv = Conv2d(
            channels, 3 * channels, 1, gain=math.sqrt(0.2)
        )  # 0.1 of the usual variance for each of the three
        self.proj = Conv2d(channels, channels, 1, **ZERO)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).transpose(2, 3).unbind(1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return (self.proj(y.transpose(1, 2).reshape(b, c, h, w)) + x) * SQRT_HALF
