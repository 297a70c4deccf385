"""LatentLPIPS and E-LatentLPIPS: perceptual distances between two latents of a diffusion model, without decoding them
(Kang et al. 2024, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from d2o.augment import latent
from d2o.augment.ada import RandomNumbers
from d2o.augment.geometry import Resample
from d2o.errors import UserError, unknown
from d2o.features.latent_vgg import LEAST, NAMES, PREFIX, LatentVggFeatures, Taps, load, load_own
from d2o.interop.assets import asset
from d2o.losses.perceptual import Target, perceptual, single
from d2o.losses.regression import l1 as mean_absolute
from d2o.spaces.base import SpaceNumbers
from d2o.spaces.load import SPACES, TINY_SD, load_space

RELEASED = tuple(name.removeprefix(PREFIX) for name in NAMES)
"""The latent spaces for which the authors released a network (its weights: `latent-lpips-NAME`)."""
SHIPPED = {TINY_SD: "latent_lpips_tiny_sd.safetensors"}
"""The latent spaces for which d2o ships one of its own."""
NAMED = (*RELEASED, *SHIPPED)
"""All that have one by their name."""
OneDraw = Mapping[str, Tensor]
"""Random numbers of one transform for each sample, as `d2o.augment.latent` takes them."""


class LatentLPIPS(nn.Module):
    """A frozen distance, in no state dict; gradients flow to the latents.

    d(a, b) = sum over the five maps of mean over positions of w . (unit f(a) - unit f(b))^2, plus `l1` times mean |a -
    b| (the authors' code adds it with weight 1, their paper has none).
    """

    def __init__(self, features: LatentVggFeatures, space: SpaceNumbers, l1: float = 0.0):
        super().__init__()
        self.features, self.space, self.l1 = features, space, float(l1)

    def forward(self, a: Tensor, b: Tensor | Target, raw: bool = False) -> Tensor:
        """Latents a, b [n, C, h, w], as the diffusion model sees them (`raw`: as the encoder gave them) -> [n]; h and w
        >= 4. b may be what `target` made of it. UserError: of another shape."""
        a, b = self.scaled(a, b, raw)
        return self.with_l1(self.perceptual(a, b), a, b, self.l1)

    def target(self, b: Tensor, raw: bool = False) -> Target:
        """b for several comparisons, its features computed once."""
        return Target(single(self.space.normalise(b) if raw else b), self.features.maps)

    def scaled(self, a: Tensor, b: Tensor | Target, raw: bool = False) -> tuple[Tensor, Tensor | Target]:
        """a and b as the diffusion model sees them, in single precision at least. UserError: as `forward`."""
        shape = b.y.shape if isinstance(b, Target) else b.shape
        if a.shape != shape or a.ndim != 4 or a.shape[1] != self.space.channels or min(a.shape[2:]) < LEAST:
            want = f"[n, {self.space.channels}, h, w] with h and w of at least {LEAST}"
            raise UserError(
                f"LatentLPIPS of this space takes two batches of latents {want}; these are {[*a.shape]} and {[*shape]}"
            )
        if raw:
            a, b = self.space.normalise(a), b if isinstance(b, Target) else self.space.normalise(b)
        return single(a), b if isinstance(b, Target) else single(b)

    def perceptual(self, a: Tensor, b: Tensor | Target) -> Tensor:
        """The part that the network sees, without the L1 term, of latents as the diffusion model sees them -> [n]."""
        return perceptual(a, b, self.features.maps, self.features.weights)

    @staticmethod
    def with_l1(distance: Tensor, a: Tensor, b: Tensor | Target, weight: float) -> Tensor:
        return distance + weight * mean_absolute(a, b.y if isinstance(b, Target) else b) if weight else distance


class ELatentLPIPS(nn.Module):
    """E-LatentLPIPS, eq. 3: the expectation over random transforms T of LatentLPIPS d(T a, T b), by `n_draws` of them
    for each sample; no state, as LatentLPIPS.

    `kinds`: the transforms (`d2o.augment.latent.operations`): "bg+cutout" and "bgc+cutout" in Table A1; "none".
    `resample`: how b and g read latents. `vanilla`: d of the unchanged latents too, for SD-CFG-3's ensemble: the "sum"
    E + w d, or the "mean" (E + w d) / (1 + w) with w = `vanilla_weight` (the paper does not say which). `l1`: weight of
    mean |a - b| of the unchanged latents; None: the distance's own. UserError: unknown kinds or values out of range.
    """

    def __init__(
        self,
        distance: LatentLPIPS,
        kinds: str = "bgco",
        *,
        vanilla: Literal["none", "sum", "mean"] = "none",
        vanilla_weight: float = 1.0,
        l1: float | None = None,
        resample: Resample = "sym6",
        n_draws: int = 1,
    ):
        super().__init__()
        latent.operations(kinds)
        for name, value, known in (
            ("vanilla", vanilla, ("none", "sum", "mean")),
            ("resample", resample, ("sym6", "bilinear")),
        ):
            if value not in known:
                raise unknown(name, value, known)
        if n_draws < 1 or vanilla_weight < 0:
            raise UserError(
                f"E-LatentLPIPS has n_draws >= 1 and vanilla_weight >= 0, not {n_draws} and {vanilla_weight}"
            )
        self.distance, self.kinds, self.resample, self.n_draws = distance, kinds, resample, n_draws
        self.vanilla, self.vanilla_weight = vanilla, float(vanilla_weight)
        self.l1 = distance.l1 if l1 is None else float(l1)

    def draw(self, randn: RandomNumbers, rand: RandomNumbers) -> list[dict[str, Tensor]]:
        """Random numbers for one comparison of a batch, by the methods of a training step's draws."""
        return [latent.draws_for(self.kinds, randn, rand) for _ in range(self.n_draws)]

    def forward(
        self, a: Tensor, b: Tensor | Target, draws: OneDraw | Sequence[OneDraw] | None = None, raw: bool = False
    ) -> Tensor:
        """Latents as `LatentLPIPS` takes them -> [n]. `draws`: of `n_draws` transforms (of one: or it alone), each for
        a's and b's sample alike; None: from torch's own generator. UserError: other shapes; draws that do not fit."""
        a, b = self.distance.scaled(a, b, raw)
        y = b.y if isinstance(b, Target) else b
        if draws is None:
            draws = [latent.draws_from_torch(self.kinds, len(a), a.device) for _ in range(self.n_draws)]
        several = [draws] if isinstance(draws, Mapping) else draws
        if len(several) != self.n_draws:
            raise UserError(f"E-LatentLPIPS takes the draws of {self.n_draws} transforms, not of {len(several)}")
        found = [
            self.distance.perceptual(*latent.augment_together([a, y], self.kinds, one, self.resample))
            for one in several
        ]
        total = torch.stack(found).mean(0) if len(found) > 1 else found[0]
        if self.vanilla != "none":
            total = total + self.vanilla_weight * self.distance.perceptual(a, b)
            total = total / (1 + self.vanilla_weight) if self.vanilla == "mean" else total
        return LatentLPIPS.with_l1(total, a, b, self.l1)


def load_latent_lpips(
    space: str,
    weights: Path | None = None,
    l1: float = 0.0,
    device: str | torch.device = "cpu",
    taps: Taps | None = None,
) -> LatentLPIPS:
    """The distance of the latent space `space`. `weights`: a released "tuned" state dict (for one of `RELEASED`), or a
    checkpoint of d2o's own (.safetensors, for any space); None: the one that ships, or the released one, which is
    looked for, but not for the meta device. `taps`: where the last two maps are taken; None: "official", or as d2o's
    own file was trained.

    UserError: a space that has none, no weights to be had, another space's.
    """
    if weights is None and space in SHIPPED:
        weights = asset(SHIPPED[space])
    if weights is not None and weights.suffix == ".safetensors":
        features, whose = load_own(weights, device, taps)
        if whose["name"] != space:
            raise UserError(
                f"{weights} compares latents of {whose['name']}, not of {space}",
                f"if they are the same latents: distance.space: {whose['name']}" if whose["name"] in NAMED else "",
            )
        return LatentLPIPS(features, SPACES.get(space) or load_space(space).numbers, l1)
    if space not in RELEASED:
        error = unknown("latent space with a distance of its own", space, NAMED)
        raise UserError(
            error.message,
            f"{error.hint}. Latents of another name are those of one of these if the autoencoder is that one's: a"
            " recipe says so by `distance.space: sd15`, or names a network that was trained for them by"
            " `distance.weights: FILE.safetensors`",
        )
    return LatentLPIPS(load(f"{PREFIX}{space}", weights, device, taps or "official"), SPACES[space], l1)
