"""Latents that are trained themselves, where others have a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.settings.wording import show


class FreeLatents(nn.Module):
    """forward() -> the latents [n, c, h, w], which begin as standard normal noise. UserError: no such shape."""

    def __init__(self, shape: list[int]):
        super().__init__()
        if not isinstance(shape, list) or len(shape) != 4 or not all(isinstance(k, int) and k > 0 for k in shape):
            raise UserError(f"network.shape: expected four sizes [n, c, h, w], got {show(shape)}")
        self.config = {"arch": "free_latents", "shape": shape}
        self.x = nn.Parameter(torch.randn(*shape))

    def forward(self) -> Tensor:
        return self.x + 0.0  # whoever holds a sharded parameter takes what a call returned
