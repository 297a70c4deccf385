"""Tiny latent diffusion models with random weights, and their checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from d2o.interop import torchvision_compat
from d2o.interop.safetensors_io import save_file
from d2o.networks.latent import Autoencoder, TextToImage
from d2o.students.base import checkpoint_meta
from d2o.teachers.base import Spec

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 32,
    "block_out_channels": [8, 8],
    "latent_channels": 4,
    "norm_num_groups": 4,
}
UNET = {
    "block_out_channels": [8, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["a", "handwritten", "seven", "eight"]


def tiny_autoencoder(path: Path | None = None, seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    network = Autoencoder(**VAE)
    if path is not None:
        save_file(path, network.state_dict(), checkpoint_meta("autoencoder", network.config, None))
    return network


def tiny_text_to_image(path: Path | None = None, seed: int = 0, **meta) -> TextToImage:
    torch.manual_seed(seed)
    network = TextToImage({**VAE, "scaling_factor": 0.5}, UNET, TEXT, WORDS).eval()
    spec = Spec("tiny", network.latent_shape, condition="text", licence="CC-BY-4.0", solver="ddim", steps=50)
    if path is not None:
        save_file(path, network.state_dict(), checkpoint_meta("teacher", network.config, spec, **meta))
    return network


def tiny_vae(**more):
    """An autoencoder of diffusers, like EDM2's in all but its size: 3 x 16 x 16 images, latents of 4 x 8 x 8. `more`
    of its arguments."""
    torchvision_compat.ensure()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    given = {"latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, **more}
    return AutoencoderKL(**given, **kinds).eval()
