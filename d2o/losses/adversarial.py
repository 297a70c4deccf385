"""The adversarial losses of every GAN here: StyleGAN2's, DD-GAN's, SiDA's and GDD's; R1 and path length.

Logits are high for what a critic takes for real, D is their sigmoid. They come in any shape [B, ...]: several of one
image are averaged. A critic of several parts (GDD's, of several backbones) gives a list of such, and the losses of its
parts are added (Zheng & Yang 2024, their code). Losses are of each image, [B].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.errors import unknown

Logits = Tensor | Sequence[Tensor]
"""[B, ...], or such of each part of a critic."""
Critic = Callable[[Tensor, Tensor | None], Logits]
"""(x [B, ...], labels [B] or None) -> logits."""

KINDS = ("nonsaturating", "hinge")
"""Forms of the critic's loss, and of the generator's against it."""
GENERATOR_KINDS = (*KINDS, "linear_fakeness", "saturating")


def generator_loss(logits: Logits, kind: str = "nonsaturating") -> Tensor:
    """What the generator pays for its images by their logits -> [B].

    "nonsaturating": -log D (Goodfellow et al. 2014, section 3); "hinge": -logit (Lim & Ye 2017); "saturating":
    log(1 - D) (Goodfellow et al., eq. 1); "linear_fakeness": 1 - D (SiDA, Zhou et al. 2025, eq. 7).
    UserError: another kind.
    """
    if kind == "nonsaturating":
        return over_parts(lambda logit: F.softplus(-logit), logits)
    if kind == "hinge":
        return over_parts(torch.neg, logits)
    if kind == "saturating":
        return over_parts(lambda logit: -F.softplus(logit), logits)
    if kind == "linear_fakeness":
        return over_parts(lambda logit: torch.sigmoid(-logit), logits)
    raise unknown("form of the generator's adversarial loss", kind, GENERATOR_KINDS)


def critic_loss(real: Logits, fake: Logits, kind: str = "nonsaturating") -> Tensor:
    """What the critic pays for the logits of real and of fake images -> [B]: `real_loss` + `fake_loss`."""
    return real_loss(real, kind) + fake_loss(fake, kind)


def real_loss(logits: Logits, kind: str = "nonsaturating") -> Tensor:
    """The critic's share for real images -> [B]: -log D, or max(0, 1 - logit) for "hinge"."""
    if check_loss(kind) == "nonsaturating":
        return over_parts(lambda logit: F.softplus(-logit), logits)
    return over_parts(lambda logit: F.relu(1 - logit), logits)


def fake_loss(logits: Logits, kind: str = "nonsaturating") -> Tensor:
    """The critic's share for fake images -> [B]: -log(1 - D), or max(0, 1 + logit) for "hinge"."""
    if check_loss(kind) == "nonsaturating":
        return over_parts(F.softplus, logits)
    return over_parts(lambda logit: F.relu(1 + logit), logits)


def check_loss(kind: str) -> str:
    """The kind. UserError: not one of KINDS."""
    if kind not in KINDS:
        raise unknown("form of the critic's loss", kind, KINDS)
    return kind


def over_parts(paid: Callable[[Tensor], Tensor], logits: Logits) -> Tensor:
    """What is paid for each logit, averaged over those of an image of one part, and added over the parts -> [B]."""
    return torch.stack([mean_per_image(paid(part)) for part in every_part(logits)]).sum(0)


def every_part(logits: Logits) -> Sequence[Tensor]:
    """The logits [B, ...] of each part of a critic."""
    return [logits] if isinstance(logits, Tensor) else logits


def mean_per_image(values: Tensor) -> Tensor:
    """Values [B, ...] -> [B], the mean of each image's."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def r1_penalty(critic: Critic, x: Tensor, labels: Tensor | None = None) -> Tensor:
    """|grad_x D(x)|^2 of each real image x [B, ...] -> [B], differentiable (Mescheder et al. 2018, eq. 9, without gamma
    / 2). D(x) is the sum of all logits of an image, of all parts; with augmentation x is the image before it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = x.detach().requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        logits = critic(x, labels)
    return squared_gradient(logits, x)


def squared_gradient(logits: Logits, x: Tensor) -> Tensor:
    """The same [B] of logits that a critic has already given for x [B, ...], which requires gradients."""
    total = torch.stack([part.sum() for part in every_part(logits)]).sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return gradient.square().flatten(1).sum(1)


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
        whole = share(lengths.mean().detach())
        self.move(whole)
        return self.penalty(lengths, whole)

    def move(self, whole: Tensor) -> None:
        """Move the running mean towards the mean of the lengths of the whole batch."""
        self.mean.lerp_(whole.to(self.mean.dtype), self.decay)

    def penalty(self, lengths: Tensor, whole: Tensor) -> Tensor:
        """Of some of the batch's lengths [B], after the running mean has moved towards `whole`, the mean of all."""
        own, pull = lengths.mean(), 2 * self.decay * (whole - self.mean)  # - d penalty / d whole, by that move
        # The last term is 0 and has that gradient: of this share of the batch, so that all shares together have all of
        # it.
        return (lengths - self.mean).square().mean() - pull * (own - own.detach())
