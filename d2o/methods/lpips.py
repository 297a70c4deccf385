"""LPIPS as a loss of images: the frozen network, with the poolings that a paper's code has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2o.features.perceptual import build_lpips
from d2o.interop.weights import find_weights


def load_lpips(device: torch.device, pooling: str = "max") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS over VGG-16 for two batches of images [B, 3, H, W] in [-1, 1], H and W >= 16; gradients flow to both.

    `pooling` "max" as VGG was trained, or "avg" as Song et al. 2023 have it. On the meta device no weights are read.
    UserError: none to be had.
    """
    meta = device.type == "meta"
    network = build_lpips("vgg", None if meta else find_weights("lpips-vgg"))
    if pooling == "avg":
        for part in list(network.modules()):
            for name, layer in part.named_children():
                if isinstance(layer, nn.MaxPool2d):
                    setattr(part, name, nn.AvgPool2d(2))
    return network.to(device)
