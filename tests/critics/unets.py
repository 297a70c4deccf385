"""Tiny teachers of every family that a critic of the teacher's U-Net is made of, and what they are asked."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from d2o.condition import Text
from d2o.critics.unet import UNetCritic
from d2o.networks.build import build_network

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SIZES = [1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]
SD = {
    "sample_size": 8,
    "block_out_channels": [8, 12],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SDXL = SD | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 2 * 6 + 5,
}
EDM = {"img_resolution": 8, "img_channels": 3, "label_dim": 3, "model_channels": 8, "num_blocks": 1, "emb_mult": 2}
EDM |= {"channel_mult": [1, 2], "attn_resolutions": [4], "dropout": 0.1}


@cache
def teacher(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind in ("sd", "sdxl"):
        net = {"class": "UNet2DConditionModel", **(SD if kind == "sd" else SDXL)}
        network: nn.Module = build_network(
            {"arch": "edm_view", "net": net, "schedule": BETAS, **({"time_ids": SIZES} if kind == "sdxl" else {})}
        )
    else:
        network = build_network({"arch": kind, **EDM})
        with torch.no_grad():  # the last convolutions of its blocks begin at almost 0
            for p in network.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return network.eval().requires_grad_(False)


KINDS = ("sd", "sdxl", "ddpmpp", "ncsnpp", "adm")


def asked(kind: str, n: int = 3) -> tuple:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(n, *shape, generator=generator)

    if kind in ("sd", "sdxl"):
        return normal(4, 8, 8), normal(4, 8, 8), Text(normal(5, 6), normal(5) if kind == "sdxl" else None)
    return normal(3, 8, 8), normal(3, 8, 8), torch.tensor([0, 2, 1])[:n]


def moved(critic: UNetCritic, scale: float = 0.1) -> UNetCritic:
    """With weights where it begins with zeros."""
    torch.manual_seed(2)
    with torch.no_grad():
        for part in (critic.conv_z, *critic.inputs):
            if part is not None:
                part.weight.normal_(std=scale)
                part.bias.normal_(std=scale)
    return critic
