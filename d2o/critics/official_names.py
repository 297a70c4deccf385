"""The names by which the published critic of GDD stores what is random and what is trained."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

LEAVES = {"weight": "weight_orig", "u": "weight_u", "v": "weight_v", "bias": "bias"}
NORM = ("weight", "bias", "running_mean", "running_var")


def own_names(backbones: Sequence[str], blocks: Sequence[Sequence[int]], there: Container[str]) -> dict[str, str]:
    """Official name -> that in `ProjectedCritic.state_dict`, of those that are `there`. `blocks`: halvings of each
    backbone's heads."""
    pairs: Iterator[tuple[str, str]] = (
        (theirs, ours)
        for i, (name, depths) in enumerate(zip(backbones, blocks, strict=True))
        for theirs, ours in [*_projections(i, name), *_heads(i, name, depths, f"heads.{i}.0.embed.weight" in there)]
    )
    return {theirs: ours for theirs, ours in pairs if ours in there}


def _projections(i: int, name: str) -> Iterator[tuple[str, str]]:
    start = f"feature_networks.{name}"
    for level in range(4):
        for leaf in ("weight", "bias"):
            yield f"{start}.scratch.layer{level}_ccm.{leaf}", f"mixing.{i}.across_channels.{level}.{leaf}"
            yield f"{start}.scratch.layer{level}_csm.out_conv.{leaf}", f"mixing.{i}.across_scales.{level}.{leaf}"
            for layer in range(2):
                ours = f"mixing.{i}.pyramid.{level}.{layer}.{leaf}"
                yield f"{start}.pretrained.layer{level + 1}.{3 + layer}.{leaf}", ours


def _heads(i: int, name: str, depths: Sequence[int], classes: bool) -> Iterator[tuple[str, str]]:
    for level, depth in enumerate(depths):
        theirs, ours = f"discriminators.{name}.mini_discs.{level}", f"heads.{i}.{level}"
        for block in range(depth):
            for leaf, official in LEAVES.items():
                yield f"{theirs}.main.{block}.main.0.{official}", f"{ours}.blocks.{block}.0.{leaf}"
            for leaf in NORM:
                yield f"{theirs}.main.{block}.main.1.{leaf}", f"{ours}.blocks.{block}.1.{leaf}"
        for leaf in ("weight", "u", "v"):
            yield f"{theirs}.{'cls' if classes else f'main.{depth}'}.{LEAVES[leaf]}", f"{ours}.output.{leaf}"
        yield f"{theirs}.embed.weight", f"{ours}.embed.weight"
        for leaf in ("weight", "bias"):
            yield f"{theirs}.embed_proj.{leaf}", f"{ours}.project.{leaf}"
            yield f"{theirs}.embed_proj.0.{leaf}", f"{ours}.project.0.{leaf}"
