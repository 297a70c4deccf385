"""LatentLPIPS: the perceptual distance between two latents of a diffusion model, without decoding them (Kang et al.
2024, section 3.2)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.errors import UserError, unknown
from d2o.features.latent_vgg import LEAST, NAMES, PREFIX, LatentVggFeatures, load
from d2o.losses.perceptual import perceptual
from d2o.losses.regression import l1 as mean_absolute
from d2o.spaces.base import SpaceNumbers
from d2o.spaces.load import SPACES

RELEASED = tuple(name.removeprefix(PREFIX) for name in NAMES)
"""The latent spaces for which the authors released a network (its weights: `latent-lpips-NAME`)."""


class LatentLPIPS(nn.Module):
    """A frozen distance, in no state dict; gradients flow to the latents.

    d(a, b) = sum over the five maps of mean over positions of w . (unit f(a) - unit f(b))^2, plus `l1` times mean |a -
    b| (the authors' code adds it with weight 1, their paper has none).
    """

    def __init__(self, features: LatentVggFeatures, space: SpaceNumbers, l1: float = 0.0):
        super().__init__()
        self.features, self.space, self.l1 = features, space, float(l1)

    def forward(self, a: Tensor, b: Tensor, raw: bool = False) -> Tensor:
        """Latents a, b [n, C, h, w], as the diffusion model sees them (`raw`: as the encoder gave them) -> [n]; h and w
        >= 4. UserError: of another shape."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != self.space.channels or min(a.shape[2:]) < LEAST:
            want = f"[n, {self.space.channels}, h, w] with h and w of at least {LEAST}"
            raise UserError(
                f"LatentLPIPS of this space takes two batches of latents {want}; these are {[*a.shape]} and"
                f" {[*b.shape]}"
            )
        if raw:
            a, b = self.space.normalise(a), self.space.normalise(b)
        distance = self.perceptual(a, b)
        return distance + self.l1 * mean_absolute(a, b) if self.l1 else distance

    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        """The part that the network sees, without the L1 term, of latents as the diffusion model sees them -> [n].

        Whoever augments the latents (E-LatentLPIPS, eq. 3) does so before this and adds the L1 term of the unchanged
        ones.
        """
        return perceptual(a, b, self.features.maps, self.features.weights)


def load_latent_lpips(
    space: str, weights: Path | None = None, l1: float = 0.0, device: str | torch.device = "cpu"
) -> LatentLPIPS:
    """The distance of the latent space `space` (one of `RELEASED`). `weights`: a released "tuned" state dict; None: it
    is looked for, but not for the meta device. UserError: unknown space, none to be had, another space's."""
    if space not in RELEASED:
        raise unknown("latent space", space, RELEASED)
    return LatentLPIPS(load(f"{PREFIX}{space}", weights, device), SPACES[space], l1)
