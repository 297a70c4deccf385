"""From a checkpoint's description and tensors to the network."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.networks.build import build_network
from d2o.networks.config import Config
from d2o.networks.fill import fill_network


def load_weights(
    network: Config, tensors: dict[str, Tensor], path: str | Path, assign: bool = False
) -> torch.nn.Module:
    """Build the network that a checkpoint describes and load its tensors. UserError when they do not fit: nothing is
    allocated then.

    `assign`: the tensors become the weights, uncopied.
    """
    try:
        with torch.device("meta") if assign else nullcontext():
            module = build_network(network, tensors, f"{path}: network")
    except UserError as error:
        raise error if str(path) in error.message else UserError(f"{path}: {error.message}", error.hint) from error
    return fill_network(module, tensors, path, assign)
