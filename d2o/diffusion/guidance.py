"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(d_c: Tensor, d_u: Tensor, cfg: float) -> Tensor:
    """D_u + cfg (D_c - D_u), of predictions with the condition and without, in any one of data, noise or velocity:
    for one x_t they come to the same. 1: D_c; 0: D_u. Shapes as they are."""
    return torch.lerp(d_u, d_c, cfg)
