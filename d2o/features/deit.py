"""Vision transformers as backbones of critics: DeiT, distilled (Touvron et al. 2021), and ViT-B (Steiner et al. 2022);
their tokens after every third block."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.features.backbone import SIZE, Backbone
from d2o.features.base import placed
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD, filled, fit, package, token_map
from d2o.interop.torch_files import read_tensors

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

MODEL = "deit_base_distilled_patch16_224"
WEIGHTS = {
    MODEL: "deit",
    "deit_small_distilled_patch16_224": "deit-small",
    "deit_tiny_distilled_patch16_224": "deit-tiny",
    "vit_base_patch16_224": "vit-base",
}
"""timm's name -> that of its weights."""
NAMES = ("deit", *WEIGHTS)
EACH = 3
"""Blocks from one tap to the next."""
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation that ViT-B takes."""


class PatchTokens(nn.Module):
    """Prepared images -> tokens with their positions, [n, first + places, d]: what comes before timm's blocks."""

    def __init__(self, network: VisionTransformer):
        super().__init__()
        self.patch_embed = network.patch_embed
        self.position: Tensor = network.pos_embed
        dist = getattr(network, "dist_token", None)
        self.first = nn.ParameterList([network.cls_token] if dist is None else [network.cls_token, dist])

    def forward(self, images: Tensor) -> Tensor:
        places = self.patch_embed(images)
        first = [token.expand(len(images), -1, -1) for token in self.first]
        return torch.cat([*first, places], 1) + self.position


class PatchGrid(nn.Module):
    """Tokens [n, first + h w, d] -> the map [n, d, h, w] of those of places; `first`: class, distillation."""

    def __init__(self, first: int):
        super().__init__()
        self.first = first

    def forward(self, tokens: Tensor) -> Tensor:
        return token_map(tokens, self.first)


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu", size: int = SIZE) -> Backbone:
    """The backbone `name` of NAMES with the weights in `weights`, else those that `find_weights` has. Four maps of 768
    channels (small: 384, tiny: 192), 14 x 14. UserError: none to be had, or another network's; timm is not installed;
    another size than that of the positions."""
    if size != SIZE:
        raise UserError(f"{name} takes {SIZE} pixels, not {size}: it knows no other positions", f"size: {SIZE}")
    model = MODEL if name == "deit" else name
    build, read = partial(untrained_deit, model), partial(read_deit, model)
    network, sha256 = filled(WEIGHTS[model], build, read, weights, device)
    placed(found := deit_backbone(network, sha256, name), device)
    return found


def deit_backbone(network: VisionTransformer, sha256: str = "", name: str = "deit") -> Backbone:
    """A vision transformer of timm's, of 12 blocks, as a backbone: maps after the blocks 3, 6, 9 and 12."""
    blocks = list(network.blocks)
    stages = [nn.Sequential(*blocks[i : i + EACH]) for i in range(0, len(blocks), EACH)]
    first = PatchTokens(network)
    stages[0] = nn.Sequential(first, *stages[0])
    taps = [PatchGrid(len(first.first)) for _ in stages]
    mean, std = (HALF, HALF) if name.startswith("vit") else (IMAGENET_MEAN, IMAGENET_STD)
    widths = [network.embed_dim] * len(stages)
    return Backbone(stages, widths, mean, std, taps=taps, grid=True, name=name, sha256=sha256)


def untrained_deit(model: str = MODEL) -> VisionTransformer:
    """timm's network."""
    return package("timm").create_model(model, pretrained=False)


def read_deit(model: str, path: Path) -> VisionTransformer:
    """The network with the weights of the file, as Meta or timm publishes it, without its classifiers or with them.
    UserError: as `load`."""
    network = untrained_deit(model)
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_tensors(path).items()}
    heads = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("head")}
    hint = f"expected the file of {model} as it was published; without a path, d2o finds or fetches it"
    return fit(network, heads | tensors, path, model, hint)
