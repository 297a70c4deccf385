"""DINOv2, whose Fréchet distance EDM2 reports beside FID (Karras et al. 2024; Stein et al. 2023 on why)."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2o.errors import UserError, unknown
from d2o.features.base import Features, placed
from d2o.features.common import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    bicubic,
    filled,
    fit,
    normalise,
    package,
    token_map,
    watch,
)
from d2o.interop.torch_files import read_tensors

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

ARCHITECTURES = {  # width, blocks, heads
    "dinov2_vits14": (384, 12, 6),
    "dinov2_vitb14": (768, 12, 12),
    "dinov2_vitl14": (1024, 24, 16),
}
NAMES = tuple(ARCHITECTURES)
PATCH, SIZE = 14, 224
OFFSET = 0.1
"""Meta's code adds this to the number of patches before it divides by the stored number, and so scales by 16.1 / 37,
not 16 / 37."""


class DinoV2(Features):
    """Vector: the class token after the last norm. Maps: the tokens of places after a quarter, a half, three quarters
    and all of the blocks, 16 x 16. `network` is one of `vision_transformer`, for images of SIZE pixels."""

    network: VisionTransformer

    def __init__(self, name: str, network: VisionTransformer, sha256: str = ""):
        super().__init__(name, network, network.embed_dim, sha256, resize=f"bicubic{SIZE}")

    def from_pixels(self, pixels: Tensor) -> Tensor:
        return normalise(bicubic(pixels, SIZE), IMAGENET_MEAN, IMAGENET_STD)

    def taps(self, x: Tensor) -> list[Tensor]:
        seen = watch(self.network.blocks, lambda: self.network.forward_features(x))
        return [token_map(tokens, 1) for tokens in seen]

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"features": self.network.forward_features(x)[:, 0]}


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The features `name` with the weights in `weights`, else those that `find_weights` has.

    UserError: unknown name; no weights to be had; a file of another network, such as the one with registers.
    """
    if name not in NAMES:
        raise unknown("extractor", name, NAMES)
    network, sha256 = filled(
        name, partial(vision_transformer, *ARCHITECTURES[name]), partial(read_dinov2, name), weights, device
    )
    return placed(DinoV2(name, network, sha256), device)


def read_dinov2(name: str, path: Path) -> VisionTransformer:
    """The network with the weights of Meta's file, for images of SIZE pixels. UserError: as `load`."""
    tensors = read_tensors(path)
    tensors.pop("mask_token", None)  # for training only
    if "pos_embed" in tensors and tensors["pos_embed"].ndim == 3:
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], SIZE // PATCH)
    hint = f"expected {name}_pretrain.pth as Meta published it; without --weights {name}=PATH, d2o finds or fetches it"
    if "cls_token" not in tensors:  # making the large network takes seconds
        raise UserError(f"{path} is not {name}: it has no 'cls_token'", hint)
    return fit(vision_transformer(*ARCHITECTURES[name]), tensors, path, name, hint)


def vision_transformer(width: int, blocks: int, heads: int, size: int = SIZE) -> VisionTransformer:
    """timm's vision transformer with DINOv2's shape and names, for images of `size` pixels, untrained."""
    return package("timm.models.vision_transformer").VisionTransformer(
        size,
        PATCH,
        embed_dim=width,
        depth=blocks,
        num_heads=heads,
        init_values=1e-5,
        num_classes=0,
        global_pool="token",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        weight_init="skip",
    )


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + s * s, d] of a class token and s x s patches -> [1, 1 + side * side, d], by Meta's
    rule: bicubic, not antialiased, with OFFSET in the scale."""
    token, patches = positions[:, :1].float(), positions[:, 1:].float()
    stored = round(patches.shape[1] ** 0.5)
    if stored == side:
        return positions
    scale = (side + OFFSET) / stored
    grid = patches.reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], 1)
