"""Two-alternative forced choices: learning and scoring which of two copies is nearer (Zhang et al. 2018, appendix)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

REAL = ("superres", "deblur", "color", "frameinterp")
"""The kinds of BAPPS that real algorithms make, which papers print as one."""
MARGIN = 0.1
"""Added to the denominators of the quotients of distances."""


def weighted(squares: Sequence[Tensor], weights: Sequence[Tensor], kept: Sequence[Tensor] | None = None) -> Tensor:
    """Squared differences of channel-normalised maps [n, C, H, W] -> distances [n]: the sum over maps of the mean over
    positions of their `weights` [C] (Zhang et al. 2018, eq. 1). `kept`: factors of the shape of each map, for
    dropout."""
    total = squares[0].new_zeros(len(squares[0]))
    for k, (square, weight) in enumerate(zip(squares, weights, strict=True)):
        square = square if kept is None else square * kept[k]
        total = total + torch.einsum("nchw,c->n", square, weight) / (square.shape[2] * square.shape[3])
    return total


def ranking_inputs(d0: Tensor, d1: Tensor) -> Tensor:
    """Distances [n] of both copies from the reference -> [n, 5], what the ranking head sees."""
    return torch.stack([d0, d1, d0 - d1, d0 / (d1 + MARGIN), d1 / (d0 + MARGIN)], 1)


def agreement(d0: Tensor, d1: Tensor, judged: Tensor) -> Tensor:
    """2AFC score of each triplet [n]: the share of judges who agree with the distances; half where these are equal.
    `judged` [n]: the share that found the second copy nearer."""
    return torch.where(d0 < d1, 1 - judged, torch.where(d1 < d0, judged, torch.full_like(judged, 0.5)))
