"""The perceptual distances of an evaluation by name, over images or over latents (LatentLPIPS: Kang et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from d2o.errors import unknown
from d2o.features.perceptual import LPIPS, Device, PairDistance
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.weights import find_weights
from d2o.losses.latent_lpips import RELEASED, LatentLPIPS, load_latent_lpips


class LatentDistance(PairDistance):
    """LatentLPIPS, without the L1 term and without augmentation."""

    def __init__(self, space: str, weights: Path | None = None, device: Device = "cpu"):
        """`weights`: the released "tuned" file; None: it is looked for. UserError: not there, or another space's."""
        path = find_weights(f"latent-lpips-{space}", weights)
        super().__init__(f"latent-lpips-{space}", f"LatentLPIPS ({space})", file_sha256(path), "latent", device)
        self.network: LatentLPIPS = load_latent_lpips(space, path).to(self.device)

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network(a, b)


PAIR_DISTANCES: dict[str, Callable[[Path | None, Device], PairDistance]] = {
    "lpips": partial(LPIPS, "alex"),
    "lpips-alex": partial(LPIPS, "alex"),
    "lpips-vgg": partial(LPIPS, "vgg"),
    **{f"latent-lpips-{space}": partial(LatentDistance, space) for space in RELEASED},
}


def load_pair_distance(name: str, weights: Path | None = None, device: Device = "cpu") -> PairDistance:
    """The distance `name` (a key of `PAIR_DISTANCES`) with the weights in a file, or where `find_weights` finds them.

    UserError: unknown name; weights that are nowhere (it says where to get them) or do not fit.
    """
    if name not in PAIR_DISTANCES:
        raise unknown("distance", name, PAIR_DISTANCES)
    return PAIR_DISTANCES[name](weights, device)
