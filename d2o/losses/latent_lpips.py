"""LatentLPIPS: the perceptual distance between two latents of a diffusion model, without decoding them (Kang et al.
2024, section 3.2)."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.errors import UserError, unknown
from d2o.interop.torch_files import read_tensors
from d2o.losses.perceptual import perceptual
from d2o.losses.regression import l1 as mean_absolute
from d2o.networks.fill import fill_network
from d2o.networks.latent_vgg import STAGES, LatentVGG
from d2o.spaces.base import SpaceNumbers
from d2o.spaces.load import SPACES

RELEASED = ("sd15", "sd21", "sdxl", "sd3", "flux")
"""The latent spaces for which the authors released a network (its weights: `latent-lpips-NAME`)."""


class Head(nn.Module):
    """The calibrated non-negative weight of each channel. `model.1`, because dropout stands before it while it is
    trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(OrderedDict([("1", nn.Conv2d(channels, 1, 1, bias=False))]))

    @property
    def weights(self) -> Tensor:
        """[channels]"""
        return self.model.get_parameter("1.weight").flatten()


class LatentLPIPS(nn.Module):
    """A frozen distance, always in eval mode; gradients flow to the latents.

    d(a, b) = sum over the five maps of mean over positions of w . (unit f(a) - unit f(b))^2, plus `l1` times mean |a -
    b| (the authors' code adds it with weight 1, their paper has none). State-dict names are those of the released
    files.
    """

    def __init__(self, space: SpaceNumbers, l1: float = 0.0):
        super().__init__()
        self.space, self.l1 = space, float(l1)
        self.net = LatentVGG(space.channels)
        for k, (width, _) in enumerate(STAGES):
            self.add_module(f"lin{k}", Head(width))
        self.requires_grad_(False)
        self.eval()

    def forward(self, a: Tensor, b: Tensor, raw: bool = False) -> Tensor:
        """Latents a, b [n, C, h, w], as the diffusion model sees them (`raw`: as the encoder gave them) -> [n]; h and w
        >= 4."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != self.space.channels or min(a.shape[2:]) < 4:
            want = f"[n, {self.space.channels}, h, w] with h and w of at least 4"
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
        return perceptual(a, b, self.net, [getattr(self, f"lin{k}").weights for k in range(len(STAGES))])

    def train(self, mode: bool = True) -> LatentLPIPS:
        """Stays in eval mode: its batch norms keep the statistics that they were released with."""
        return super().train(False)


def load_latent_lpips(space: str, path: str | Path, l1: float = 0.0) -> LatentLPIPS:
    """The distance of the latent space `space` (one of `RELEASED`) with a released "tuned" state dict, read strictly.

    UserError: unknown space; `path` is no such file, or not one of this space.
    """
    if space not in RELEASED:
        raise unknown("latent space", space, RELEASED)
    tensors = read_tensors(path)
    # The released files name the heads twice, as modules and as a list of the same modules.
    twice = {name: tensors.pop(name) for name in [*tensors] if name.startswith("lins.")}
    for name, tensor in twice.items():
        if (same := tensors.get(name.replace("lins.", "lin", 1))) is None or not torch.equal(same, tensor):
            raise UserError(f"{path} is damaged: its {name} is not the same as {name.replace('lins.', 'lin', 1)}")
    return fill_network(LatentLPIPS(SPACES[space], l1), tensors, path)
