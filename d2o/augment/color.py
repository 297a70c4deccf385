"""Colour part of ADA: brightness, contrast, luma flip, hue and saturation as one affine map of RGB.

Karras et al. 2020 (ADA), appendix B. Images are in [-1, 1], so that contrast scales about mid-grey; luma is the mean of
R, G and B, and its axis (1, 1, 1) / sqrt(3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def color_map(
    brightness: Tensor, contrast: Tensor, luma_flip: Tensor, hue: Tensor, saturation: Tensor
) -> tuple[Tensor, Tensor]:
    """The matrix [B, 3, 3] and offset [B, 3] of the five in that order, each [B]: added; factor; 0 or 1; radians;
    factor."""
    eye = torch.eye(3, device=hue.device, dtype=hue.dtype)
    luma = torch.full_like(eye, 1 / 3)  # the projection onto the luma axis
    # cross @ rgb is (luma axis) x rgb; built of constants that are already on the device
    cross = (eye.roll(1, 0) - eye.roll(1, 1)) / math.sqrt(3)
    cos, sin, flip, keep = (v[:, None, None] for v in (hue.cos(), hue.sin(), luma_flip.to(hue.dtype), saturation))
    matrix = contrast[:, None, None] * eye
    offset = (brightness * contrast)[:, None].expand(-1, 3)
    # Each leaves the matrix as it is, to the bit, at its neutral strength.
    for step in (eye - 2 * flip * luma, cos * eye + (1 - cos) * luma + sin * cross, keep * eye + (1 - keep) * luma):
        matrix = (step[:, :, :, None] * matrix[:, None, :, :]).sum(2)
        offset = (step * offset[:, None, :]).sum(2)
    return matrix, offset


def recolor(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """images [B, C, H, W] under the map. C is 3, or 1: grey images are treated as RGB with equal channels, and the
    result's luma is kept, so that hue and saturation do nothing to them."""
    matrix, offset = matrix.to(images.dtype), offset.to(images.dtype)
    if images.shape[1] == 1:
        return images * matrix.sum(2).mean(1)[:, None, None, None] + offset.mean(1)[:, None, None, None]
    return torch.einsum("bij,bjhw->bihw", matrix, images) + offset[:, :, None, None]
