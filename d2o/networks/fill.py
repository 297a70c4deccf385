"""Tensors of a file into the network that the file describes."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from d2o.errors import UserError

N = TypeVar("N", bound=nn.Module)


def fill_network(network: N, tensors: dict[str, Tensor], path: str | Path, assign: bool = False) -> N:
    """The network with these tensors as its state. `assign`: they become the weights, uncopied. UserError, naming
    `path`: they do not fit."""
    try:
        network.load_state_dict(tensors, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: the weights do not fit the network that the file describes ({detail})") from error
    return network
