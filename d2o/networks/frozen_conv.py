"""Convolutions whose weights are held fixed for ever, as of frozen features.

torch's convolution keeps its input for the backward pass, and in the second one (R1 through the features) works out
the weight's part too, group by group: thousands of small convolutions for the depthwise ones of an EfficientNet. With a
fixed weight a convolution is a linear map A of its input; backward is A^T, the second backward pass A again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.grad import conv2d_input


class Geometry(NamedTuple):
    """How a kernel is moved over an image."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Remembered(FunctionCtx):
    weight: Tensor
    geometry: Geometry
    size: torch.Size
    dtype: torch.dtype


class _Convolve(torch.autograd.Function):
    """A x."""

    @staticmethod
    def forward(ctx: _Remembered, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.weight, ctx.geometry, ctx.size, ctx.dtype = weight, geometry, x.shape, x.dtype
        stride, padding, dilation, groups = geometry
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: _Remembered, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight = ctx.weight.to(gradient.dtype)
        return _Transposed.apply(gradient, weight, ctx.geometry, ctx.size).to(ctx.dtype), None, None


class _Transposed(torch.autograd.Function):
    """A^T g."""

    @staticmethod
    def forward(ctx: _Remembered, g: Tensor, weight: Tensor, geometry: Geometry, size: torch.Size) -> Tensor:
        ctx.weight, ctx.geometry = weight, geometry
        return conv2d_input(size, weight, g, *geometry)

    @staticmethod
    def backward(ctx: _Remembered, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Convolve.apply(gradient, ctx.weight, ctx.geometry), None, None, None


class FrozenConv2d(nn.Conv2d):
    """A convolution with a fixed weight and bias. `same`: padded as TensorFlow pads, more behind than before."""

    same = False

    def forward(self, x: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        padding = self.padding
        if self.same:
            rows, columns = (self._missing(x.shape[2 + i], i) for i in (0, 1))
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            padding = (0, 0)
        geometry = Geometry(self.stride, padding, self.dilation, self.groups)
        y = _Convolve.apply(x, self.weight, geometry)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def _missing(self, side: int, i: int) -> int:
        """Pixels by which a side is too short for ceil(side / stride) places."""
        stride, reach = self.stride[i], (self.kernel_size[i] - 1) * self.dilation[i] + 1
        return max((-(-side // stride) - 1) * stride + reach - side, 0)


class FrozenConv2dSame(FrozenConv2d):
    same = True


def hold_convolutions(network: nn.Module) -> None:
    """Let the convolutions of a network, torch's and timm's of TensorFlow's padding, be `FrozenConv2d`s, in place."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.__class__ = FrozenConv2d
        elif type(module).__name__ == "Conv2dSame":
            module.__class__ = FrozenConv2dSame
