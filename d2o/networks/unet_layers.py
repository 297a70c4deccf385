"""The residual blocks of a U-Net and their last convolutions, by part and depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from d2o.errors import UserError
from d2o.networks.edm2_blocks import Block
from d2o.networks.edm_blocks import UNetBlock

LAST = {"UNetBlock": "conv1", "Block": "conv_res1", "ResnetBlock2D": "conv2"}
"""Class of a block -> its last 3x3 convolution: EDM's, EDM2's, diffusers'."""
PARTS = {"enc": "encoder", "dec": "decoder", "down_blocks": "encoder", "mid_block": "decoder", "up_blocks": "decoder"}
"""What of a module's name says in which half of the U-Net it is; EDM counts the middle to the decoder."""


@dataclass(frozen=True)
class BlockLayer:
    """`name` of the block, `part` "encoder" or "decoder", `depth` within it: 0 beside the image."""

    name: str
    part: str
    depth: int
    conv: nn.Module


def last_convolutions(network: nn.Module, who: str) -> list[BlockLayer]:
    """The last convolution of every residual block, in the order in which they are called. UserError: a network without
    such blocks, by the name `who`."""
    found = list(_blocks(network))
    if not found:
        raise UserError(
            f"{who} has no U-Net of residual blocks (EDM's, EDM2's or diffusers')",
            "layer activations are of U-Nets; transformers and style generators have none of these blocks",
        )
    encoder = [block for block in found if block[1] == "encoder"]
    decoder = [block for block in found if block[1] == "decoder"]
    decoder.sort(key=lambda block: "mid_block" not in block[0])  # stable: the middle goes first
    layers = [BlockLayer(name, part, i, conv) for i, (name, part, conv) in enumerate(encoder)]
    last = len(decoder) - 1
    return layers + [BlockLayer(name, part, last - i, conv) for i, (name, part, conv) in enumerate(decoder)]


def _blocks(network: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(name, part, convolution); only those of a U-Net: an autoencoder beside it has blocks of the same class."""
    for name, module in network.named_modules():
        kind = type(module).__name__
        if not isinstance(module, UNetBlock | Block) and kind != "ResnetBlock2D":
            continue
        path = name.split(".")
        part = next((PARTS[word] for word in path if word in PARTS), None)
        if part is not None and not {"vae", "encoder", "decoder"} & set(path):
            yield name, part, module.get_submodule(LAST[kind])
