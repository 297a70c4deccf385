"""Geometric part of ADA: pixel blitting, which is exact, and any affine map as one warp between wavelet resamplings.

Karras et al. 2020 (ADA), appendix B. Maps are 3 x 3 matrices [B, 3, 3] on (x, y, 1), in pixels from the image's centre,
x to the right and y down, and lead from a pixel of the result to where its value comes from.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from d2o.augment.filters import MIDDLE, matrix, reflected

Resample = Literal["sym6", "bilinear"]


def after(first: Tensor, *others: Tensor) -> Tensor:
    """The product of maps in that order. Elementwise, as positions must not be rounded to TF32 on any setting of the
    user's."""
    for other in others:
        first = (first[..., :, :, None] * other[..., None, :, :]).sum(-2)
    return first


def _map(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    zero, one = torch.zeros_like(xx), torch.ones_like(xx)
    return torch.stack([xx, xy, dx, yx, yy, dy, zero, zero, one], -1).unflatten(-1, (3, 3))


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """The result is larger by the factors x, y [B]."""
    zero = torch.zeros_like(x)
    return _map(1 / x, zero, zero, 1 / y, zero, zero)


def rotation(angle: Tensor) -> Tensor:
    """The result is turned counter-clockwise (as seen) by `angle` [B] in radians."""
    zero = torch.zeros_like(angle)
    return _map(angle.cos(), -angle.sin(), angle.sin(), angle.cos(), zero, zero)


def quarter_turns(turns: Tensor) -> Tensor:
    """`rotation` by turns [B] x 90 degrees, without rounding."""
    return rotation(turns * (torch.pi / 2)).round()


def translation(shift: Tensor) -> Tensor:
    """The result is moved by shift [B, 2] pixels, to the right and down."""
    zero, one = torch.zeros_like(shift[:, 0]), torch.ones_like(shift[:, 0])
    return _map(one, zero, zero, one, -shift[:, 0], -shift[:, 1])


def blit(images: Tensor, map: Tensor) -> Tensor:
    """images [B, C, R, R] under a map of whole pixels (flips, quarter turns, whole shifts): every value of the result
    is one of the image's."""
    size = images.shape[-1]
    at = torch.arange(size, device=images.device, dtype=map.dtype)
    x, y = (reflected(v, size).round().long() for v in _positions(map, at, at, size, size))
    source = (y * size + x).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, source).unflatten(2, (size, size))


def warp(images: Tensor, map: Tensor, resample: Resample = "sym6") -> Tensor:
    """images [B, C, H, W] under any map: twice finer rows (sym6), bilinear sampling there, and back by the same filter;
    or (`resample` "bilinear") bilinear sampling of the pixels, which blurs and is cheaper.

    The image is continued by reflection without end, where the published code pads by at most a side less a pixel,
    measured on the host, and has zeros beyond. The identity gives the image back, as the wavelet is orthonormal.
    """
    height, width = images.shape[2:]
    return sampled(images, places(map, height, width, resample), resample)


def places(map: Tensor, height: int, width: int, resample: Resample = "sym6") -> Tensor:
    """Where `sampled` reads images of that size under the map: [B, rows, columns, 2] (x, y), in [-1, 1]."""
    fine = resample == "sym6"
    rows, columns = (
        torch.arange(2 * n + 10 if fine else n, device=map.device, dtype=map.dtype) for n in (height, width)
    )
    if fine:
        rows, columns = (rows - MIDDLE) / 2, (columns - MIDDLE) / 2
    x, y = _positions(map, rows, columns, height, width)
    x, y = (_fine(v, n) if fine else reflected(v, n) for v, n in ((x, width), (y, height)))
    return torch.stack([x * (2 / (len(columns) - 1)) - 1, y * (2 / (len(rows) - 1)) - 1], -1)


def sampled(images: Tensor, places: Tensor, resample: Resample = "sym6") -> Tensor:
    """images [B, C, H, W] read at `places` of theirs."""
    grid = places.to(images.dtype)
    if resample == "bilinear":
        return _Sample.apply(images, grid)
    height, width = images.shape[2:]
    fine = matrix("up", height, images) @ images @ matrix("up", width, images).mT
    return matrix("down", height, images) @ _Sample.apply(fine, grid) @ matrix("down", width, images).mT


def _fine(v: Tensor, size: int) -> Tensor:
    """Pixel positions v as numbers of fine samples. Samples that exist are read where they are, the others where
    reflection leads to: sym6 is not quite symmetric, so only the former gives the identity back at the edges."""
    at = 2 * v + MIDDLE
    return torch.where((at > -0.01) & (at < 2 * size + 9.01), at, 2 * reflected(v, size) + MIDDLE)


def _positions(map: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the results at `rows` [M] and `columns` [N] (in pixels) come from: columns and rows [B, M, N], in
    pixels."""
    across, down = (width - 1) / 2, (height - 1) / 2
    column, row = columns[None, None, :] - across, rows[None, :, None] - down
    xx, xy, dx, yx, yy, dy = (v[:, None, None] for v in map[:, :2].flatten(1).unbind(1))
    return xx * column + xy * row + dx + across, yx * column + yy * row + dy + down


class _Kept(FunctionCtx):
    """What the two maps remember of their call."""

    shape: torch.Size
    saved_tensors: tuple[Tensor, ...]


class _Sample(torch.autograd.Function):
    """Bilinear `grid_sample` at a constant grid. It is linear in the image, so its gradient is the adjoint map, whose
    gradient is it again: that makes it differentiable any number of times (gradient penalties need two) in versions of
    torch where grid_sample is not.
    """

    @staticmethod
    def forward(ctx: _Kept, image: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = image.shape
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)

    @staticmethod
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _Adjoint.apply(gradients[0], grid, ctx.shape), None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        unread = gradient.new_empty(
            shape
        )  # the image's values matter to the gradient of the grid only, which is not asked for
        bilinear, border, align_corners = 0, 1, True
        wanted = [True, False]
        return torch.ops.aten.grid_sampler_2d_backward(
            gradient.contiguous(), unread, grid, bilinear, border, align_corners, wanted
        )[0]

    @staticmethod
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _Sample.apply(gradients[0], grid), None, None
