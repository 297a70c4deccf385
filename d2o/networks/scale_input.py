"""Networks that are told the guidance scale w of their sample (Meng et al. 2023, On distillation of guided diffusion
models, section 3.1; Luo et al. 2023, LCM): one student then stands for the teacher under every guidance.

A sinusoidal embedding of w goes through a linear map, without bias and 0 at first, into the embedding of the noise
level, ahead of its own layers: of UNet2DConditionModels by diffusers' own `time_cond_proj_dim`, so that its pipelines
tell such a network their `guidance_scale`; of EDM's U-Nets, which have that input for augmentation labels, by it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.networks.edm_blocks import Linear
from d2o.networks.edm_unet import EDMPrecond
from d2o.networks.edm_view import EDMView

CHANNELS = 256


def scale_embedding(w: Tensor) -> Tensor:
    """Guidance scales w [B] -> [B, 256] float32: sines and cosines of 1000 (w - 1) f with 128 frequencies f from 1 down
    to 1e-4, as diffusers' pipelines embed theirs."""
    half = CHANNELS // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000) / (half - 1)))
    angles = (w.to(torch.float32) - 1)[:, None] * 1000 * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def add_scale_input(network: nn.Module) -> None:
    """Give a denoiser that input, in place, and write it into its configuration; with it at 0, it computes what it
    did. The fourth argument of its call is then `scale_embedding(w)`. An input for augmentation labels, which are never
    given to students, is replaced. UserError: a network that has no place for it."""
    device = next(network.parameters()).device
    if isinstance(network, EDMPrecond):
        width = network.model.map_layer0.weight.shape[1]
        network.model.map_augment = Linear(CHANNELS, width, bias=False, gain=0.0).to(device)
        network.config["augment_dim"] = CHANNELS
        return
    if not isinstance(network, EDMView) or network.kind != "UNet2DConditionModel":
        kind = network.kind if isinstance(network, EDMView) else type(network).__name__
        raise UserError(
            f"pairs.cfg is a range, and the student, a {kind}, has no place for a guidance scale to be told",
            "UNet2DConditionModels (Stable Diffusion 1, 2 and XL) and EDM's U-Nets have one; or give one number",
        )
    embedding = network.net.time_embedding
    if embedding.cond_proj is not None:
        raise UserError("the teacher's network is itself told a guidance scale; no student can be made of that yet")
    projection = nn.Linear(CHANNELS, embedding.linear_1.in_features, bias=False, device=device)
    nn.init.zeros_(projection.weight)
    embedding.cond_proj = projection
    network.net.register_to_config(time_cond_proj_dim=CHANNELS)
    network.config["net"]["time_cond_proj_dim"] = CHANNELS
