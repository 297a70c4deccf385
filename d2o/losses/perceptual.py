"""Perceptual distance over the feature maps of any extractor."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Maps = Callable[[Tensor], list[Tensor]]


def perceptual(x: Tensor, y: Tensor, maps: Maps) -> Tensor:
    """Sum over the extractor's maps of the squared distance between channel-normalised features, averaged over
    positions (LPIPS without calibrated weights; Zhang et al. 2018, eq. 1 with w = 1). x, y [B, C, H, W] in [-1, 1] ->
    [B]; gradients flow to x.
    """
    total = x.new_zeros(len(x))
    for f, g in zip(maps(x), maps(y), strict=True):
        total = total + (unit(f) - unit(g)).square().sum(1).flatten(1).mean(1)
    return total


def unit(f: Tensor) -> Tensor:
    """Features [B, C, H, W] scaled to length one over C at every position."""
    return f / (f.square().sum(1, keepdim=True) + 1e-8).sqrt()
