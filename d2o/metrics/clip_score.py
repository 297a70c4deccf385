"""CLIP score: how well images follow their prompts (Hessel et al. 2021, without its factor and its clipping)."""

from __future__ import annotations

from torch import Tensor

from d2o.errors import UserError


def clip_score(images: Tensor, prompts: Tensor) -> Tensor:
    """Unit vectors of n images [n, d] and of their n prompts [n, d] -> their cosines [n]. UserError: not as many of one
    as of the other."""
    if len(images) != len(prompts):
        raise UserError(
            f"{len(images)} images, but {len(prompts)} prompts: the CLIP score takes a prompt for every image"
        )
    return (images * prompts).sum(1)
