"""Latent spaces by name, each once per process and device."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from d2o.errors import UserError, nearest
from d2o.interop import catalogue
from d2o.interop.assets import asset
from d2o.interop.hub import hub_snapshot, is_repository
from d2o.networks.latent import Autoencoder, load_autoencoder, load_text_to_image
from d2o.spaces.base import PIXELS, UNNAMED, LatentSpace, Pixels, SpaceNumbers

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TINY_SD, EDM2 = "tiny-sd", "edm2"
MEAN = (5.81, 3.25, 0.12, -2.15)
STD = (4.17, 4.62, 3.71, 3.28)
SIGMA_DATA = 0.5

SPACES = {
    "sd15": SpaceNumbers(4, 0.18215),
    "sd21": SpaceNumbers(4, 0.18215),
    "sdxl": SpaceNumbers(4, 0.13025),
    "sd3": SpaceNumbers(16, 1.5305, 0.0609),
    "flux": SpaceNumbers(16, 0.3611, 0.1159),
    # EDM2 (Karras et al. 2024): sd-vae-ft-mse on pixels in [0, 1], standardised per channel over ImageNet, with a
    # standard deviation of 0.5; the autoencoder's own scaling factor (0.18215) plays no part.
    EDM2: SpaceNumbers(4, tuple(SIGMA_DATA / std for std in STD), MEAN, low=0.0),
}
"""The latent spaces of published models."""
SOURCES = {
    "sd15": "sd15",
    "sd21": "sd15",  # the same latent space
    "sdxl": "sdxl",
    "sd3": "sd3-medium",
    "flux": "flux-vae",
    EDM2: "sd-vae-ft-mse",
}
"""Space -> the entry of the catalogue that has its autoencoder."""

_spaces: WeakValueDictionary[tuple[str, str], LatentSpace] = WeakValueDictionary()


def load_space(name: str, device: str | torch.device = "cpu") -> LatentSpace:
    """The space of that name: "pixels", one of `SPACES`, "tiny-sd", or where an autoencoder lies (a diffusers folder, a
    checkpoint of `d2o train`, owner/name on the hub). The same object for all who ask in this process, as long as one
    of them keeps it. UserError: nothing of that name."""
    return kept_space(name, device) or keep_space(_open(name, device))


def keep_space(space: LatentSpace) -> LatentSpace:
    """The space, which `load_space` gives from now on for its name and device."""
    if space.name != UNNAMED:
        _spaces[(space.name, device_name(space.device))] = space
    return space


def kept_space(name: str, device: str | torch.device) -> LatentSpace | None:
    """The space of that name that somebody in this process keeps on that device; None if nobody does."""
    return _spaces.get((name, device_name(device)))


def device_name(device: str | torch.device) -> str:
    """With its number, as tensors on it say it."""
    return str(torch.empty(0, device=device).device)


def _open(name: str, device: str | torch.device) -> LatentSpace:
    if name == PIXELS:
        return Pixels()
    if name == UNNAMED:
        raise UserError("these are latents, and the file that they are from does not say how they become images")
    if name in SPACES:
        revision = _entry(name).revision
        bare = torch.device(device).type == "meta"
        load = partial(bare_autoencoder, SPACES[name].channels) if bare else partial(_fetched, name)
        return LatentSpace(name, SPACES[name], load, device, revision, published=True)
    path = Path(name)
    if name == TINY_SD:
        path = asset(TINY_SD)
    elif not path.exists():
        if not is_repository(name):
            near = nearest(name, [PIXELS, TINY_SD, *SPACES])
            raise UserError(
                f"unknown latent space {name!r}" + (f": did you mean {near!r}?" if near else ""),
                f"known: {', '.join([PIXELS, TINY_SD, *SPACES])}; or the folder of an autoencoder",
            )
        path = hub_snapshot(name)
    return LatentSpace.of(name, autoencoder_in(path), device)


def bare_autoencoder(channels: int) -> AutoencoderKL:
    """The autoencoder of any of `SPACES` on the meta device, for what it costs: all have the size of Stable
    Diffusion 1's, 83,653,863 parameters with 4 channels."""
    with torch.device("meta"):
        return Autoencoder(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=channels).vae


def _entry(name: str) -> catalogue.Published:
    return catalogue.AUTOENCODERS.get(SOURCES[name]) or catalogue.TEACHERS[SOURCES[name]]


def _fetched(name: str) -> AutoencoderKL:
    return autoencoder_in(catalogue.fetch(_entry(name)))


def autoencoder_in(path: Path) -> AutoencoderKL:
    """The AutoencoderKL in a diffusers folder (its own, or a pipeline's), or in a checkpoint of `d2o train`. UserError:
    there is none, or it is damaged."""
    if path.is_dir() and not (path / "checkpoints").is_dir():
        return load_autoencoder(path).vae
    try:
        return load_autoencoder(path).vae
    except UserError:
        return load_text_to_image(path)[0].vae
