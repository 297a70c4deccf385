"""The networks that a method only calls."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from d2o.methods.base import Method


def hold_frozen(method: Method, device: torch.device) -> None:
    """Put the networks of `Method.frozen` on the device, in eval mode, without gradients of their own. ValueError: one
    that is also trained or in the training state, a mistake of the method's."""
    own = (*method.players().values(), *method.states().values())
    kept = {id(t) for net in own for t in net.state_dict(keep_vars=True).values()}  # not the base of a LoRA
    kept |= {id(p) for net in own for p in net.parameters() if p.requires_grad}
    for name, network in method.frozen().items():
        if any(id(p) in kept for p in weights_and_buffers(network)):
            raise ValueError(f"{name!r} of {type(method).__name__}.frozen() is also trained, or in the training state")
        network.to(device).eval().requires_grad_(False)


def weights_and_buffers(network: nn.Module) -> Iterable[torch.Tensor]:
    """Parameters and buffers: the weights of frozen features are buffers."""
    yield from network.parameters()
    yield from network.buffers()


def count_frozen(method: Method) -> dict[str, int]:
    """Numbers in each of the networks that a method only calls; what two of them share counts once."""
    seen: set[int] = set()
    counts = {}
    for name, network in method.frozen().items():
        new = {id(t): t.numel() for t in weights_and_buffers(network) if id(t) not in seen}
        seen |= new.keys()
        counts[name] = sum(new.values())
    return counts
