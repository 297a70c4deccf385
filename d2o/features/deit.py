"""DeiT, distilled (Touvron et al. 2021), as the backbone of a critic: its tokens after every third block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.features.backbone import Backbone
from d2o.features.base import placed
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD, filled, fit, package, token_map
from d2o.interop.torch_files import read_tensors

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

NAMES = ("deit",)
MODEL = "deit_base_distilled_patch16_224"
PREFIX_TOKENS, EACH = 2, 3
"""Tokens before those of places (class, distillation); blocks from one tap to the next."""


class PatchTokens(nn.Module):
    """Prepared images -> tokens with their positions, [n, 2 + places, d]: what comes before timm's blocks."""

    def __init__(self, network: VisionTransformer):
        super().__init__()
        self.patch_embed = network.patch_embed
        self.position: Tensor = network.pos_embed
        self.first = nn.ParameterList([network.cls_token, network.dist_token])

    def forward(self, images: Tensor) -> Tensor:
        places = self.patch_embed(images)
        first = [token.expand(len(images), -1, -1) for token in self.first]
        return torch.cat([*first, places], 1) + self.position


class PatchGrid(nn.Module):
    """Tokens [n, 2 + h w, d] -> the map [n, d, h, w] of those of places."""

    def forward(self, tokens: Tensor) -> Tensor:
        return token_map(tokens, PREFIX_TOKENS)


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Backbone:
    """The backbone with the weights in `weights`, else those that `find_weights` has. Four maps of 768 channels, 14 x
    14. UserError: none to be had, or another network's; timm is not installed."""
    network, sha256 = filled(name, untrained_deit, read_deit, weights, device)
    placed(found := deit_backbone(network, sha256), device)
    return found


def deit_backbone(network: VisionTransformer, sha256: str = "") -> Backbone:
    """A distilled DeiT of timm's, of 12 blocks, as a backbone: maps after the blocks 3, 6, 9 and 12."""
    blocks = list(network.blocks)
    stages = [nn.Sequential(*blocks[i : i + EACH]) for i in range(0, len(blocks), EACH)]
    stages[0] = nn.Sequential(PatchTokens(network), *stages[0])
    taps = [PatchGrid() for _ in stages]
    return Backbone(
        stages, [network.embed_dim] * len(stages), IMAGENET_MEAN, IMAGENET_STD, taps=taps, name="deit", sha256=sha256
    )


def untrained_deit(model: str = MODEL) -> VisionTransformer:
    """timm's network."""
    return package("timm").create_model(model, pretrained=False)


def read_deit(path: Path) -> VisionTransformer:
    """The network with the weights of Meta's file. UserError: as `load`."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_tensors(path).items()}
    hint = "expected deit_base_distilled_patch16_224-df68dfff.pth as Meta published it; without a path, d2o fetches it"
    return fit(untrained_deit(), tensors, path, "the distilled DeiT", hint)
