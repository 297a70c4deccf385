"""Copies of networks with other parameters, and arithmetic on networks whose parameters may be sharded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its shard of a DTensor (in place changes reach it), else the tensor
    itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # duck-typed: DTensor takes a second to import


def replaced(module: nn.Module, parameters: Mapping[nn.Parameter, nn.Parameter]) -> nn.Module:
    """A deep copy with these parameters (old -> new) in place of copies, ties kept: nothing is allocated for the old
    ones."""
    return copy.deepcopy(module, {id(old): new for old, new in parameters.items()})


def outline(module: nn.Module) -> nn.Module:
    """A deep copy without numbers: its parameters lie on the meta device."""
    meta = {p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    return replaced(module, meta)


@torch.no_grad()
def follow(mine: Iterable[Tensor], theirs: Iterable[Tensor], weight: float) -> None:
    """mine <- mine + weight (theirs - mine), of two networks that are sharded alike or not at all."""
    ours, others = [local(t.detach()) for t in mine], [local(t.detach()) for t in theirs]
    if weight == 1:
        torch._foreach_copy_(ours, others)
    else:
        torch._foreach_lerp_(ours, others, weight)
