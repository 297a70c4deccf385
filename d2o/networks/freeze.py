"""Freezing by kind of layer: most of a teacher's convolutions already are what a one-step student needs (Zheng & Yang
2024, section 4.2, Table 2)."""

from __future__ import annotations

from torch import nn

from d2o.errors import UserError, unknown
from d2o.networks.edm2_blocks import Block
from d2o.networks.edm_blocks import UNetBlock

FREEZE = ("none", "conv", "conv_qkv", "conv_qkv_skip")
"""What is frozen inside U-Net blocks: nothing; the convolutions and the attention's output projection (their GDD-I);
also the attention's queries, keys and values; also the 1x1 shortcuts. Norms, embeddings, and all that is outside of
blocks (input, output, NCSN++'s input pyramid) train on."""

LAYERS: dict[type[nn.Module], tuple[tuple[str, ...], ...]] = {
    UNetBlock: (("conv0", "conv1", "proj"), ("qkv",), ("skip",)),
    Block: (("conv_res0", "conv_res1", "attn_proj"), ("attn_qkv",), ("conv_skip",)),
}
"""Kind of block -> the layers that each level adds."""


def freeze(network: nn.Module, level: str) -> int:
    """Fix these layers' weights and biases for good (before an optimiser is made); returns how many numbers that are.

    UserError: unknown level; a network without U-Net blocks of the EDM families, at another level than "none".
    """
    if level not in FREEZE:
        raise unknown("student.freeze", level, FREEZE)
    if level == "none":
        return 0
    blocks = [
        (module, names) for module in network.modules() for kind, names in LAYERS.items() if isinstance(module, kind)
    ]
    if not blocks:
        raise UserError(
            f"student.freeze: {level} freezes layers of U-Net blocks, and this method's network has none",
            "student.freeze: none",
        )
    count = 0
    for block, names in blocks:
        for name in (name for part in names[: FREEZE.index(level)] for name in part):
            layer = getattr(block, name, None)
            for p in [] if layer is None else layer.parameters():
                p.requires_grad_(False)
                count += p.numel()
    return count
