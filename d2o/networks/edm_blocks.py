"""The parts of EDM's U-Nets: convolutions with FIR resampling, the residual block, the two noise embeddings.

Sources: Song et al. 2021 (DDPM++, NCSN++), Dhariwal & Nichol 2021 (ADM), Karras et al. 2022, appendix F.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F


class Init(TypedDict, total=False):
    """How a layer begins, as `Linear` says it."""

    mode: str
    gain: float
    bias_gain: float


def _uniform_fan(shape: tuple[int, ...], fan_in: int, fan_out: int, mode: str, gain: float) -> Tensor:
    bound = {"xavier": math.sqrt(6 / (fan_in + fan_out)), "kaiming": math.sqrt(3 / fan_in)}[mode]
    values = torch.rand(shape)
    # Without memory there is nothing to scale, and torch's arithmetic on meta imports its compiler first: seconds.
    return values if values.is_meta else gain * bound * (2 * values - 1)


def run_block(block: nn.Module, x: Tensor, emb: Tensor, checkpointing: bool) -> Tensor:
    """block(x, emb). With `checkpointing`, what the block computed inside is not kept for the backward pass but
    computed again, with the same
    dropout: memory for a third more time (Chen et al. 2016)."""
    if not (checkpointing and torch.is_grad_enabled()):
        return block(x, emb)
    random = block.training and bool(block.dropout)
    return torch.utils.checkpoint.checkpoint(block, x, emb, use_reentrant=False, preserve_rng_state=random)


class Linear(nn.Module):
    """x [B, in] -> [B, out]; initialised by `mode` ("xavier" or "kaiming", uniform) times `gain`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mode: str = "xavier",
        gain: float = 1.0,
        bias_gain: float = 0.0,
    ):
        super().__init__()
        self.weight = nn.Parameter(_uniform_fan((out_features, in_features), in_features, out_features, mode, gain))
        self.bias = (
            nn.Parameter(_uniform_fan((out_features,), in_features, out_features, mode, bias_gain)) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """A convolution (kernel 1 or 3), or none (kernel 0), after an optional factor-2 FIR resampling.

    Down: stride-2 depthwise filter f before the convolution; up: transposed stride-2 filter 4f. `fused` swaps the two
    for down-sampling (convolution with the filter's padding first, then the unpadded filter), as NCSN++'s residual
    input pyramid does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        fir: tuple[int, ...] = (1, 1),
        fused: bool = False,
        mode: str = "xavier",
        gain: float = 1.0,
        bias_gain: float = 0.0,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down, self.fused = in_channels, out_channels, up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.resample_filter: Tensor
        if kernel:
            fans = (in_channels * kernel**2, out_channels * kernel**2)
            self.weight = nn.Parameter(_uniform_fan((out_channels, in_channels, kernel, kernel), *fans, mode, gain))
            self.bias = nn.Parameter(_uniform_fan((out_channels,), *fans, mode, bias_gain))
        if up or down:
            rows = [[a * b / sum(fir) ** 2 for b in fir] for a in fir]
            self.register_buffer("resample_filter", torch.tensor(rows, dtype=torch.float32)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        pad = weight.shape[-1] // 2 if weight is not None else 0
        if not (self.up or self.down):
            assert weight is not None
            return F.conv2d(x, weight, self.bias, padding=pad)
        f = self.resample_filter.to(x.dtype)
        f_pad = (f.shape[-1] - 1) // 2
        if self.fused and self.down:
            assert weight is not None
            x = F.conv2d(x, weight, self.bias, padding=pad + f_pad)
            return F.conv2d(x, f.expand(self.out_channels, 1, -1, -1), groups=self.out_channels, stride=2)
        f = f.expand(self.in_channels, 1, -1, -1)
        if self.up:
            x = F.conv_transpose2d(x, 4 * f, groups=self.in_channels, stride=2, padding=f_pad)
        else:
            x = F.conv2d(x, f, groups=self.in_channels, stride=2, padding=f_pad)
        return x if weight is None else F.conv2d(x, weight, self.bias, padding=pad)


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels: int, eps: float):
        super().__init__(min(32, channels // 4), channels, eps=eps)


class UNetBlock(nn.Module):
    """GN-SiLU-conv, noise embedding, GN-SiLU-conv, skip, optional self-attention. x [B, in, H, W], emb [B, E] -> [B,
    out, H', W']."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        fir: tuple[int, ...] = (1, 1),
        resample_proj: bool = False,
        scale_shift: bool = True,
        init: Init | None = None,
        init_zero: Init | None = None,
        init_attn: Init | None = None,
    ):
        super().__init__()
        init, init_zero = init or {}, init_zero or {}
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.dropout, self.skip_scale, self.scale_shift = dropout, skip_scale, scale_shift
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, fir=fir, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if scale_shift else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, up=up, down=down, fir=fir, **init)
        if heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, **(init_attn if init_attn is not None else init))
            self.proj = Conv2d(out_channels, out_channels, 1, **init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None].to(y.dtype)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            y = F.silu(torch.addcmul(shift, self.norm1(y), scale + 1))
        else:
            y = F.silu(self.norm1(y + e))
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        x = (y + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.heads:
            x = (self.proj(self.attention(self.norm2(x))) + x) * self.skip_scale
        return x

    def attention(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # The 1x1 convolution's channels are ordered head, channel, (q, k, v).
        q, k, v = self.qkv(x).reshape(b, self.heads, c // self.heads, 3, h * w).permute(3, 0, 1, 4, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, h, w)


class PositionalEmbedding(nn.Module):
    """t [B] -> (cos, sin) [B, channels]; frequencies 10000^(-i/h), or -i/(h-1) with `endpoint`."""

    def __init__(self, channels: int, endpoint: bool):
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        freqs = (1 / 10000) ** (i / (half - (1 if self.endpoint else 0)))
        x = t.outer(freqs.to(t.dtype))
        return torch.cat([x.cos(), x.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """t [B] -> (cos, sin)(2 pi f t) [B, channels] with fixed random frequencies (standard deviation `scale`)."""

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.freqs: Tensor
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        x = t.outer((2 * math.pi * self.freqs).to(t.dtype))
        return torch.cat([x.cos(), x.sin()], dim=1)
