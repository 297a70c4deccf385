"""Corruptions of ADA: noise on every pixel and channel, and a square that is cut out. Karras et al. 2020 (ADA),
appendix B."""

from __future__ import annotations

import torch
from torch import Tensor

CUTOUT = 0.5
"""The square's side, of the image's."""


def add_noise(images: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """images [B, C, H, W] plus std [B] times standard normal noise [B, C, H, W]."""
    return images + (std[:, None, None, None] * noise).to(images.dtype)


def cut_out(images: Tensor, cut: Tensor, centre: Tensor) -> Tensor:
    """images [B, C, R, R], where cut [B] is 1 without a square around centre [B, 2] (across, down; 0 and 1 are the
    image's edges): mid-grey, 0."""
    size = images.shape[-1]
    at = (torch.arange(size, device=images.device, dtype=centre.dtype) + 0.5) / size
    inside = (at - centre[:, :, None]).abs() < CUTOUT / 2
    hole = inside[:, 1, :, None] & inside[:, 0, None, :] & (cut > 0)[:, None, None]
    return images.masked_fill(hole[:, None], 0)
