"""The latent space of EDM2's 512x512 networks: sd-vae-ft-mse on pixels in [0, 1], standardised per channel. (EDM2,
Karras et al. 2024.)

The autoencoder's own scaling factor (0.18215) is not used, and the pixels are not in [-1, 1] as elsewhere with this
autoencoder.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.interop import torchvision_compat
from d2o.teachers import catalogue
from d2o.teachers.base import Spec, Teacher

MEAN = (5.81, 3.25, 0.12, -2.15)
STD = (4.17, 4.62, 3.71, 3.28)
"""Statistics of the raw latents over ImageNet, per channel."""
LATENTS = "edm2"
"""What `Spec.latents` says of them."""
AT_ONCE = 4
"""Images decoded or encoded at a time, in float32 whatever is asked for around it: at 512 px they take about 10 GB
meanwhile."""
SIGMA_DATA = 0.5
"""Standard deviation of the latents that the diffusion model sees."""


def to_diffusion(raw: Tensor) -> Tensor:
    """The autoencoder's latents [B, 4, h, w] -> what the diffusion model sees: (raw - mean) / std * 0.5."""
    scale, bias = _affine(raw)
    return raw * scale + bias


def from_diffusion(x: Tensor) -> Tensor:
    """The inverse of `to_diffusion`."""
    scale, bias = _affine(x)
    return (x - bias) / scale


@torch.inference_mode()
def decode(vae: Any, x: Tensor) -> Tensor:
    """Diffusion latents [B, 4, h, w] -> images [B, 3, 8h, 8w] float32 in [-1, 1], by a diffusers AutoencoderKL.

    EDM2 makes bytes of these by cutting off (trunc(255 p), p in [0, 1]), EDM by rounding.
    """
    raw = from_diffusion(x.to(torch.float32)).to(vae.dtype)
    with torch.autocast(x.device.type, enabled=False):
        pixels = torch.cat([vae.decode(part).sample for part in raw.split(AT_ONCE)])
    return pixels.to(torch.float32).clamp(0, 1) * 2 - 1


@torch.inference_mode()
def encode(vae: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] in [-1, 1] -> (mean, std) of their raw latents, both [B, 4, H/8, W/8] float32: what EDM2's
    data sets store."""
    pixels = ((images + 1) / 2).to(vae.dtype)
    with torch.autocast(images.device.type, enabled=False):
        found = [vae.encode(part).latent_dist for part in pixels.split(AT_ONCE)]
    return torch.cat([part.mean for part in found]).to(torch.float32), torch.cat([part.std for part in found]).to(
        torch.float32
    )


def draw(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """One diffusion latent of each image: to_diffusion(mean + std * noise), `noise` standard normal of the same
    shape."""
    return to_diffusion(mean + std * noise)


def _affine(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or x.shape[1] != len(MEAN):
        raise ValueError(f"EDM2's latents have shape [B, 4, h, w], not {list(x.shape)}")
    scale = SIGMA_DATA / torch.tensor(STD, dtype=x.dtype, device=x.device)
    bias = -torch.tensor(MEAN, dtype=x.dtype, device=x.device) * scale
    return scale.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)


class EDM2LatentTeacher(Teacher):
    """EDM2 in latent space. The autoencoder is fetched and loaded when something is decoded, not before."""

    def __init__(
        self, network: nn.Module, spec: Spec, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ):
        super().__init__(network, replace(spec, latents=LATENTS), device, dtype)

    def decode(self, x: Tensor) -> Tensor:
        return decode(autoencoder(x.device), x)

    def latents(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], or stored means and standard deviations [B, 8, H/8, W/8] of their raw latents
        -> diffusion latents [B, 4, H/8, W/8] drawn by standard normal `noise` of that shape."""
        if noise.device.type == "meta":  # a plan, which needs no autoencoder
            return torch.empty_like(noise)
        if images.shape[1] == 2 * len(MEAN):
            mean, std = images.chunk(2, dim=1)
            return draw(mean, std, noise)
        return draw(
            *encode(autoencoder(images.device), images), noise
        ).clone()  # no inference tensors: they may meet autograd


@functools.cache
def autoencoder(device: torch.device) -> Any:
    """sd-vae-ft-mse, fetched where it is not here; the same one for all who decode on a device. UserError: no network,
    damaged."""
    return load_autoencoder(catalogue.fetch(catalogue.AUTOENCODERS["sd-vae-ft-mse"])).to(device)


def load_autoencoder(path: Path) -> Any:
    """The AutoencoderKL in a folder, in eval mode. UserError: damaged, or not safetensors."""
    torchvision_compat.ensure()
    from diffusers import AutoencoderKL

    try:
        return (
            AutoencoderKL.from_pretrained(path, local_files_only=True, use_safetensors=True)
            .eval()
            .requires_grad_(False)
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} holds no autoencoder that can be read ({str(error).splitlines()[0]})",
            "remove it, to fetch it again",
        ) from error
