"""The network of LatentLPIPS (Kang et al. 2024, section 3.2) as features of latents."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.features.base import Features, placed
from d2o.features.common import filled
from d2o.inputs import JsonObject
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import file_sha256, load_file
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import WEIGHTS
from d2o.networks.fill import fill_network
from d2o.networks.latent_vgg import Taps, TunedVGG
from d2o.networks.load import load_weights
from d2o.spaces.load import SPACES

PREFIX = "latent-lpips-"
NAMES = tuple(name for name in WEIGHTS if name.startswith(PREFIX))
KIND = "latent_lpips"
"""Of checkpoints of d2o's own."""
LEAST = 4
"""The smallest side of the latents."""


class LatentVggFeatures(Features):
    """Takes latents as the diffusion model sees them, in place of images in [-1, 1]. Maps: the five of LatentLPIPS.
    Vector: the mean over places of the last. `weights`: the calibrated weight [c] of each channel of each map."""

    network: TunedVGG

    def __init__(self, name: str, network: TunedVGG, sha256: str = ""):
        super().__init__(name, network, network.net.widths[-1], sha256, least=LEAST, takes=(network.net.channels,))

    @property
    def weights(self) -> list[Tensor]:
        return self.network.weights

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def taps(self, x: Tensor) -> list[Tensor]:
        return self.network(x)

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"features": self.taps(x)[-1].mean((2, 3))}


def load(
    name: str, weights: Path | None = None, device: str | torch.device = "cpu", taps: Taps = "official"
) -> LatentVggFeatures:
    """The features `name` of NAMES with the released "tuned" file; None: it is looked for. UserError: not there, or
    another network's."""
    channels = SPACES[name.removeprefix(PREFIX)].channels
    build = partial(TunedVGG, channels, taps=taps)
    network, sha256 = filled(name, build, lambda path: read_tuned(build, path), weights, device)
    placed(found := LatentVggFeatures(name, network, sha256), device, fast=False)
    return found


def read_tuned(build: Callable[[], TunedVGG], path: Path) -> TunedVGG:
    """A released file, read strictly. UserError: it is damaged, or another network's."""
    tensors = read_tensors(path)
    # They name the heads twice, as modules and as a list of the same modules.
    twice = {name: tensors.pop(name) for name in [*tensors] if name.startswith("lins.")}
    for name, tensor in twice.items():
        if (same := tensors.get(name.replace("lins.", "lin", 1))) is None or not torch.equal(same, tensor):
            raise UserError(f"{path} is damaged: its {name} is not the same as {name.replace('lins.', 'lin', 1)}")
    return fill_network(build(), tensors, path).eval().requires_grad_(False)


def load_own(
    path: Path, device: str | torch.device = "cpu", taps: Taps | None = None
) -> tuple[LatentVggFeatures, JsonObject]:
    """The features of a checkpoint of d2o's own (kind "latent_lpips"), and what it says of its latent space. `taps`:
    other ones than it was trained with. UserError: missing, truncated or foreign file, or of another kind."""
    tensors, meta = load_file(path)
    if meta.get("kind") != KIND:
        raise UserError(f"{path} holds a {meta.get('kind', 'foreign object')}, not a distance between latents")
    config = check_checkpoint(meta, path)["network"]
    network = load_weights(config | ({"taps": taps} if taps else {}), tensors, path)
    if not isinstance(network, TunedVGG):
        raise UserError(f"{path}: a {type(network).__name__} is no distance between latents")
    sha256 = file_sha256(path)
    placed(found := LatentVggFeatures(f"{path.stem}@{sha256[:6]}", network, sha256), device, fast=False)
    return found, meta["space"]
