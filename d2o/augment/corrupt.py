"""Corruptions of ADA: noise on every pixel and channel, and a rectangle that is cut out. Karras et al. 2020 (ADA),
appendix B."""

from __future__ import annotations

import torch
from torch import Tensor

CUTOUT = 0.5
"""The rectangle's sides, of the image's."""


def add_noise(images: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """images [B, C, H, W] plus std [B] times standard normal noise [B, C, H, W]."""
    return images + (std[:, None, None, None] * noise).to(images.dtype)


def cut_out(images: Tensor, cut: Tensor, centre: Tensor) -> Tensor:
    """images [B, C, H, W], where cut [B] is 1 without a rectangle of half their sides around centre [B, 2] (across,
    down; 0 and 1 are the image's edges): mid-grey, 0."""
    height, width = images.shape[2:]
    across = _inside(centre[:, 0, None], width)[:, None, :]
    hole = _inside(centre[:, 1, None], height)[:, :, None] & across & (cut > 0)[:, None, None]
    return images.masked_fill(hole[:, None], 0)


def _inside(centre: Tensor, size: int) -> Tensor:
    """Which of `size` pixels the rectangle covers: [B, size]."""
    at = (torch.arange(size, device=centre.device, dtype=centre.dtype) + 0.5) / size
    return (at - centre).abs() < CUTOUT / 2
