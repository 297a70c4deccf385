"""Adversarial losses of a critic that judges every place of several maps by itself, and R1 on one sample (Kang et al.
2024, section 3.3).

Logits are a list of maps [B, h, w], high for real. A loss is taken at every place, averaged over the places of a map,
then over the maps ("mean"), or summed over the maps ("sum"): the paper does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from d2o.errors import unknown
from d2o.losses.adversarial import fake_loss, generator_loss, mean_per_image, real_loss
from d2o.networks.full_precision import full_precision

REDUCTIONS = ("mean", "sum")
R1_OF = ("x", "xz")
MapCritic = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""(x [B, C, H, W], z [B, C, H, W]) -> maps of logits."""


def over_maps(values: Sequence[Tensor], reduce: str = "mean") -> Tensor:
    """Values at every place of several maps [B, h, w] -> [B]. UserError: an unknown reduction."""
    if reduce not in REDUCTIONS:
        raise unknown("reduction over a critic's maps", reduce, REDUCTIONS)
    each = torch.stack([mean_per_image(value) for value in values])
    return each.mean(0) if reduce == "mean" else each.sum(0)


def generator_loss_of_maps(fake: Sequence[Tensor], reduce: str = "mean") -> Tensor:
    """softplus(-D) of generated samples (eq. 6, the non-saturating loss) -> [B]."""
    return over_maps([generator_loss(logits) for logits in fake], reduce)


def critic_loss_of_maps(real: Sequence[Tensor], fake: Sequence[Tensor], reduce: str = "mean") -> Tensor:
    """softplus(-D) of real samples + softplus(D) of fake ones (eq. 6) -> [B]."""
    paid = [real_loss(r) + fake_loss(f) for r, f in zip(real, fake, strict=True)]
    return over_maps(paid, reduce)


# R1 -------------------------------------------------------------------------------------------------------------------


def r1_of_maps(critic: MapCritic, x: Tensor, z: Tensor, of: str = "x", reduce: str = "mean") -> Tensor:
    """|grad D|^2 of real samples x [n, C, H, W] with their noise z -> [n], differentiable (Mescheder et al. 2018, eq.
    9, without gamma / 2); D is the maps' logits reduced as in the loss. `of`: the gradient is by "x", or by both
    ("xz"). To be called, and differentiated again, within `twice_differentiable`. UserError: unknown `of`.
    """
    if of not in R1_OF:
        raise unknown("gradient that R1 is of", of, R1_OF)
    x = x.detach().requires_grad_(True)
    z = z.detach().requires_grad_(of == "xz")
    logits = over_maps(critic(x, z), reduce)
    gradients = torch.autograd.grad(logits.sum(), [x, z] if of == "xz" else [x], create_graph=True)
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0)


def r1_weight(gamma: float = 0.01, interval: int = 16, half: bool = True, lazy_gain: bool = True) -> float:
    """What |grad D|^2 is multiplied by in the iterations that take it, one of `interval`: gamma / 2 times `interval`
    (Karras et al. 2020, appendix B), or without the half, or without the gain."""
    return gamma * (0.5 if half else 1.0) * (interval if lazy_gain else 1)


class Place(Protocol):
    """Where a micro-batch lies in the global batch (`d2o.methods.base.Draws`)."""

    @property
    def start(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def total(self) -> int: ...


def one_sample(place: Place, row: int = 0) -> tuple[int, float]:
    """The single sample that R1 is taken on, `row` of the global batch (the first one: batches come shuffled) -> (its
    row in this micro-batch, weight of its loss as the micro-batch's).

    The weight is total / count where it lies here, so that all micro-batches and processes together take it once, and 0
    with row 0 elsewhere. Of each process one micro-batch at least has to take its share, be it 0: the others wait for
    its gradients.
    """
    here = row - place.start
    return (here, place.total / place.count) if 0 <= here < place.count else (0, 0.0)


@contextmanager
def twice_differentiable(device: torch.device) -> Iterator[None]:
    """Within the block (forward pass, gradient and backward pass), attention runs by plain products, which can be
    differentiated twice as fused kernels cannot, and everything in full precision."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), full_precision(device.type):
        yield
