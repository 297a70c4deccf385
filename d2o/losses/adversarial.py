"""The adversarial losses of StyleGAN2: non-saturating logistic, R1, path length."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def d_logistic(real: Tensor, fake: Tensor) -> Tensor:
    """Critic: mean softplus(-D(x)) + mean softplus(D(G(z))), logits of any shape -> scalar (Goodfellow et al. 2014)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def g_logistic(fake: Tensor) -> Tensor:
    """Generator, non-saturating: mean softplus(-D(G(z))), logits of any shape -> scalar."""
    return F.softplus(-fake).mean()


def r1_penalty(critic_logits: Tensor, x: Tensor, gamma: float = 1.0) -> Tensor:
    """gamma / 2 times the mean over the batch of |grad_x D(x)|^2 (Mescheder et al. 2018, eq. 9) -> scalar,
    differentiable.

    `critic_logits` [B, ...]: of real images x [B, ...], which require gradients. With augmentation x is the image
    before it.
    """
    (gradient,) = torch.autograd.grad(critic_logits.sum(), x, create_graph=True)
    return gamma / 2 * gradient.square().flatten(1).sum(1).mean()


def spread(images: Tensor) -> Tensor:
    """How far the images [B, ...] of a batch are from each other: the mean over pixels of their standard deviation ->
    scalar, detached."""
    return images.detach().std(0).mean()


def path_lengths(
    images: Tensor, ws: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
) -> Tensor:
    """Lengths |J^T y| [B] of images [B, C, H, W] made from styles ws [B, num_ws, w_dim], differentiable (Karras et al.
    2020, section 3.2, eq. 4).

    y is standard normal over sqrt(H W), from `generator` or given as `noise` (before the division); the length is the
    root of the mean over the num_ws inputs of the squared norms over w_dim.
    """
    if noise is None:
        source = images.device if generator is None else generator.device
        noise = torch.randn(images.shape, generator=generator, device=source, dtype=images.dtype).to(images.device)
    y = noise / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()


class PathLength(nn.Module):
    """Mean over the batch of (|J^T y| - a)^2, where a is the running mean of the lengths (Karras et al. 2020, eq. 4).

    `mean` (a) is its only state, a buffer for checkpoints: 0 at first, moved by `decay` towards each batch's mean
    before it is used; the gradient goes through that move too, as in the authors' code. The caller applies the weight
    and the interval, and makes the images from fresh noise (StyleGAN2: weight 2, every 4 steps times 4, half a batch).
    """

    def __init__(self, decay: float = 0.01):
        super().__init__()
        self.decay = decay
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(()))

    def forward(
        self,
        images: Tensor,
        ws: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        share: Callable[[Tensor], Tensor] = lambda mean: mean,
    ) -> Tensor:
        """Arguments as for `path_lengths` -> scalar. `share` makes of this process's mean that of all."""
        lengths = path_lengths(images, ws, generator, noise)
        own = lengths.mean()
        with torch.no_grad():
            whole = share(own.detach())
            self.mean.lerp_(whole.to(self.mean.dtype), self.decay)
            pull = 2 * self.decay * (whole - self.mean)  # - d penalty / d whole, the part of it that a's move makes
        # The last term is 0 and has that gradient: of this process's share, so that all of them together have the whole
        # batch's.
        return (lengths - self.mean).square().mean() - pull * (own - own.detach())
