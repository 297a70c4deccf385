"""A convolution divided by its largest singular value (Miyato et al. 2018, "Spectral normalization for generative
adversarial networks")."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FIRST, EACH = 15, 3
"""Steps of the power iteration when the layer is made, and in each iteration of training (the usual code makes one in
each pass; a critic's iteration has three)."""


class SpectralConv2d(nn.Conv2d):
    """x -> conv(x, weight / sigma) + bias, sigma = u^T W v of the weight as a matrix of rows [out, in k k], which is
    differentiated with u and v held fixed.

    u and v move in the first pass in training mode after `stale` was set, by EACH steps, and at no other time: so that
    neither the number of micro-batches nor that of processes changes them. A weight that is divided among processes is
    whole in a pass, and only there. Not torch's `spectral_norm`, which moves them in every pass.
    """

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__(inputs, outputs, kernel, stride, padding, bias=bias)
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(inputs * kernel * kernel), dim=0))
        self.stale = True
        self.iterate(FIRST)

    @torch.no_grad()
    def iterate(self, steps: int) -> None:
        """So many steps of the power iteration."""
        matrix = self.weight.flatten(1)
        for _ in range(0 if matrix.is_meta else steps):
            self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
            self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.stale:
            self.iterate(EACH)
            self.stale = False
        # Copies, since u and v move while what was computed by them may still be differentiated.
        sigma = (self.u.clone() * (self.weight.flatten(1) @ self.v.clone())).sum()
        return self._conv_forward(x, self.weight / sigma, self.bias)


def settle_sigmas(network: nn.Module) -> None:
    """Let the next pass move the u and v of all `SpectralConv2d`s of a network: their weights have been updated."""
    for part in network.modules():
        if isinstance(part, SpectralConv2d):
            part.stale = True
