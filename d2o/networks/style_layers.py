"""The layers of StyleGAN2: equalised learning rate, modulated convolution, noise.

Karras et al. 2018 (section 4.1 equalised learning rate), 2019 (noise, styles), 2020
(section 2.2 modulation and demodulation, appendix B filters). All weights start as N(0, 1); the scale that an
initialisation would give is applied in the forward pass, so that one learning rate suits every layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.errors import unknown
from d2o.networks.fir import TAPS, fir_taps, resample

MODULATIONS = ("auto", "grouped", "scale")

# "auto" runs grouped convolutions where the activations, (in + out) H W, are at least this many times as large as the
# kernel, in out k^2: writing a kernel per sample then costs less than two passes over the activations. Milliseconds
# grouped / scale, forward, one thread of an AMD EPYC (Zen 4), torch 2.13:
#   channels, size             ratio    batch 1        batch 8         batch 64         with up: batch 1, 8, 64
#   512 -> 512, 3x3, 4 px       0.01    5.3 / 3.8      146 / 8         1087 / 35        9.3 / 7.3, 211 / 9, 2049 / 31
#   512 -> 512, 3x3, 32 px      0.4     47 / 46        507 / 376       3946 / 3067      34 / 20, 385 / 150, 2940 / 1302
#   256 -> 256, 3x3, 64 px      3.6     50.4 / 50.5    421 / 435                        24 / 25, 255 / 196
#   64 -> 64, 3x3, 256 px       228     60 / 82        591 / 739       4620 / 6882      26 / 28, 620 / 546, 7262 / 4571
#   512 -> 3, 1x1, 32 px        343     0.15 / 0.17    1.9 / 2.9       13 / 159
# With backward: 256 px, batch 1, 157 / 176; 32 px, batch 8, 1656 / 1144. Transposed convolutions have slow groups, and
# always scale. The batch is not asked, so that a sample does not depend on it more than it must. On CUDA nothing has
# been measured yet: always scale.
GROUPED_FROM = {"cpu": 3.0, "cuda": math.inf}


def lrelu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2, times sqrt(2) so that unit variance stays about that."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class EqualizedLinear(nn.Module):
    """x [B, in] -> [B, out]. The weight is N(0, 1) / lr_mult at first and used times lr_mult / sqrt(in), the bias times
    lr_mult: Adam, whose steps do not depend on the scale of gradients, then trains this layer as with learning rate
    times lr_mult. `bias_init`: the bias in effect.
    `activate`: leaky ReLU with gain.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        bias_init: float = 0.0,
        lr_mult: float = 1.0,
        activate: bool = False,
    ):
        super().__init__()
        self.gain, self.lr_mult, self.activate = lr_mult / math.sqrt(in_features), lr_mult, activate
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mult)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_mult)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # The gain goes to the input: the weight of an encoder of 256 px images has 100 million values.
        x = F.linear(x * self.gain, self.weight, None if self.bias is None else self.bias * self.lr_mult)
        return lrelu(x) if self.activate else x


class EqualizedConv2d(nn.Module):
    """x [B, in, H, W] -> [B, out, H, W], or half of H and W with `down`; kernel 1 or 3, weight used times 1 / sqrt(in *
    kernel^2).

    Down: FIR filter, then the convolution with stride 2; a 1x1 convolution instead follows the filter's decimation,
    which is the same and cheaper. forward(x, shift [B, out] or None, gain): `shift` is added to the bias, before the
    leaky ReLU (`activate`); `gain` multiplies the result.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        down: bool = False,
        bias: bool = True,
        activate: bool = True,
        taps: tuple[float, ...] = TAPS,
    ):
        super().__init__()
        self.kernel, self.down, self.activate = kernel, down, activate
        self.gain = 1 / math.sqrt(in_channels * kernel**2)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.taps: Tensor
        if down:
            self.register_buffer("taps", fir_taps(taps), persistent=False)

    def forward(self, x: Tensor, shift: Tensor | None = None, gain: float = 1.0) -> Tensor:
        weight = self.weight * self.gain
        if not self.down:
            x = F.conv2d(x, weight, padding=self.kernel // 2)
        elif self.kernel == 1:
            x = F.conv2d(resample(x, self.taps, down=2), weight)
        else:  # one sample more than the filter's own padding on every side, for the convolution, which then needs none
            n = len(self.taps)
            x = F.conv2d(resample(x, self.taps, pad=(1 + (n - 1) // 2, 1 + (n - 2) // 2)), weight, stride=2)
        if self.bias is not None:
            x = x + self.bias[:, None, None]
        if shift is not None:
            x = x + shift[:, :, None, None]
        x = lrelu(x) if self.activate else x
        return x if gain == 1 else x * gain


def modulated_conv(
    x: Tensor, weight: Tensor, styles: Tensor, *, demodulate: bool = True, up: bool = False, how: str = "auto"
) -> Tensor:
    """Convolution of x [B, in, H, W] with a kernel of its own for each sample (Karras et al. 2020, eq. 1 and 3), weight
    [out, in, k, k], k odd.

    w'_oik = styles_i w_oik, styles [B, in]; demodulated, w''_oik = w'_oik / sqrt(sum_ik w'_oik^2 + 1e-8). -> [B, out,
    H, W], zeros outside; with `up` the transposed convolution of stride 2, cut to [B, out, 2H + k - 2, 2W + k - 2] (a
    FIR filter is to follow).
    `how`: "grouped" builds the B kernels and runs one convolution of B groups; "scale" scales the input channels,
    convolves all samples with the same kernel, scales the output channels. Same maths; "auto" takes the cheaper.
    UserError: unknown `how`.
    """
    if how not in MODULATIONS:
        raise unknown("modulation", how, MODULATIONS)
    batch, channels, *size = x.shape
    out, pad = len(weight), weight.shape[-1] // 2
    norm = None
    if demodulate:
        norm = (styles.square() @ weight.square().sum((2, 3)).t() + 1e-8).rsqrt()
    if how == "auto":
        large = (channels + out) * size[0] * size[1] >= GROUPED_FROM.get(x.device.type, math.inf) * weight.numel()
        # A compiled or exported network should take any batch; a number of groups is part of the network.
        how = "grouped" if large and not up and not torch.compiler.is_compiling() else "scale"
    if how == "scale":
        x = x * styles[:, :, None, None]
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2) if up else F.conv2d(x, weight, padding=pad)
        return x if norm is None else x * norm[:, :, None, None]
    kernels = weight * styles[:, None, :, None, None]
    if norm is not None:
        kernels = kernels * norm[:, :, None, None, None]
    x = x.reshape(1, batch * channels, *size)
    if up:
        x = F.conv_transpose2d(x, kernels.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
    else:
        x = F.conv2d(x, kernels.flatten(0, 1), padding=pad, groups=batch)
    return x.reshape(batch, out, *x.shape[2:])


class ModulatedConv(nn.Module):
    """(x [B, in, H, W], w [B, w_dim]) -> [B, out, H, W], or 2H, 2W with `up` (transposed convolution, then FIR filter
    with gain 4).

    The styles are an affine function of w with bias 1 at first. Demodulated weights need no equalised gain, it would
    cancel; without demodulation (the layer that gives colours) the styles carry it, 1 / sqrt(in * kernel^2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel: int = 3,
        *,
        up: bool = False,
        demodulate: bool = True,
        taps: tuple[float, ...] = TAPS,
        how: str = "auto",
    ):
        super().__init__()
        self.up, self.demodulate, self.how = up, demodulate, how
        self.gain = 1.0 if demodulate else 1 / math.sqrt(in_channels * kernel**2)
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.taps: Tensor
        if up:
            self.register_buffer("taps", fir_taps(taps), persistent=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        styles = self.affine(w)
        if not self.demodulate:
            styles = styles * self.gain
        x = modulated_conv(x, self.weight, styles, demodulate=self.demodulate, up=self.up, how=self.how)
        if not self.up:
            return x
        # What the transposed convolution put around the image counts towards the filter's own padding.
        n, k = len(self.taps), self.weight.shape[-1]
        return resample(x, self.taps, pad=((n + 1) // 2 - k // 2, (n - 2) // 2 - k // 2 + 1), gain=4)
