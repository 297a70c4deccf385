"""Latents -> images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIXELS = 4 * 512 * 512  # decoded at once; about 10 GB at Stable Diffusion's width


@torch.no_grad()
def decode(vae: Any, latents: Tensor, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Latents in the diffusion space, [B, C, h, w] -> images [B, 3, H, W] float32 in [-1, 1].

    In float32 whatever is asked for around it (SDXL's decoder overflows in half precision), a few images at a time.
    """
    x = latents.to(vae.device, torch.float32) / scaling_factor + shift_factor
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    at_once = max(1, PIXELS // (x.shape[-2] * x.shape[-1] * scale**2))
    with torch.autocast(x.device.type, enabled=False):
        return torch.cat([vae.decode(part, return_dict=False)[0].clamp(-1, 1) for part in x.split(at_once)])
