"""The parts of EDM2's U-Net: magnitude-preserving sums, concatenation and SiLU, layers whose weights are normalised,
the residual block.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", configuration G
(section 2.3, appendix B). Every layer keeps the expected magnitude of its activations, so there are no norms with
parameters and no biases.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-4


def normalize(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x scaled to unit root mean square over the dimensions `dim`; the norm is computed in float32."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    count = math.prod(
        [x.shape[d] for d in ([dim] if isinstance(dim, int) else dim)]
    )  # without the batch, whose size an exported graph leaves open
    return x / (EPSILON + norm * math.sqrt(1 / count)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over the root mean square of its output for normal input (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, scaled to unit magnitude for independent inputs of unit magnitude (eq. 88)."""
    return torch.lerp(a, b.to(a.dtype), t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a, then of b, weighted so that they contribute as 1 - t to t whatever their numbers (eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


def _full_precision(x: Tensor) -> AbstractContextManager:
    """Embeddings stay in float32, as in the official half precision mode, and are cast where they enter the
    convolutions."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


class MPFourier(nn.Module):
    """t [B] -> sqrt(2) cos(f t + p) [B, channels], with fixed random frequencies and phases (eq. 75)."""

    def __init__(self, channels: int):
        super().__init__()
        self.freqs: Tensor
        self.phases: Tensor
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        y = t.to(torch.float32).outer(self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return math.sqrt(2) * y.cos()


class MPConv(nn.Module):
    """A convolution, or with `kernel` 0 a linear layer, without bias, whose weight is normalised per output channel
    before use (eq. 47)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *([kernel, kernel] if kernel else [])))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.normalized() * (gain / math.sqrt(self.weight[0].numel()))
        if not self.kernel:
            with _full_precision(x):
                return F.linear(x.to(torch.float32), weight)
        return F.conv2d(x, weight.to(x.dtype), padding=self.kernel // 2)

    def normalized(self) -> Tensor:
        """The weight with unit root mean square per output channel, float32."""
        return normalize(self.weight.to(torch.float32), dim=tuple(range(1, self.weight.ndim)))


class Block(nn.Module):
    """Resampling by 2, two convolutions modulated by the embedding, self-attention. x [B, in, H, W], emb [B, E] -> [B,
    out, H', W'].

    Encoder blocks normalise each pixel of the main path; decoder blocks apply the 1x1 skip convolution at the end of
    it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        decoder: bool = False,
        resample: str = "",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ):
        super().__init__()
        self.out_channels, self.decoder, self.resample = out_channels, decoder, resample
        self.dropout, self.res_balance, self.attn_balance, self.clip_act = (
            float(dropout),
            res_balance,
            attn_balance,
            clip_act,
        )
        self.heads = out_channels // channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels, 0)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if self.heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            b, c, h, w = x.shape
            x = x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)
        if not self.decoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=1)
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = F.dropout(mp_silu(y * scale[:, :, None, None].to(y.dtype)), self.dropout, self.training)
        y = self.conv_res1(y)
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self.attention(self.attn_qkv(x))), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def attention(self, qkv: Tensor) -> Tensor:
        b, c, h, w = qkv.shape
        # The 1x1 convolution's channels are ordered head, channel, (q, k, v); each is a unit-magnitude vector (cosine
        # attention).
        qkv = normalize(qkv.reshape(b, self.heads, c // 3 // self.heads, 3, h * w), dim=2)
        q, k, v = qkv.permute(3, 0, 1, 4, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c // 3, h, w)
