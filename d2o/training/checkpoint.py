"""What a run writes: `state.safetensors`, from which it continues bit for bit, and the product's own checkpoints. No pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2o import __version__
from d2o.errors import UserError
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import load_file, save_file


def pack_optimizer(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's tensors by position of the parameter: `<prefix>/<index>/<key>`."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}/{index}/{key}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items() if value is not None}


def unpack_optimizer(prefix: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "/"):
            _, index, key = name.rsplit("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_state(
    path: Path, networks: dict[str, nn.Module], ema: nn.Module, optimizers: dict[str, torch.optim.Optimizer], record: dict[str, Any]
) -> None:
    """Everything that training continues from; `record` holds the plain values (iteration, best metric, recipe...)."""
    tensors: dict[str, Tensor] = {}
    for name, network in networks.items():
        tensors |= {f"network/{name}/{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"ema/{key}": value for key, value in ema.state_dict().items()}
    for name, optimizer in optimizers.items():
        tensors |= pack_optimizer(f"optimizer/{name}", optimizer)
    save_file(path, tensors, {"format": "d2o", "version": 1, "kind": "state", "d2o": __version__, **record})


def load_state(path: Path, networks: dict[str, nn.Module], ema: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """Undo `save_state`; returns the record. UserError when the file is not a training state or does not fit."""
    tensors, record = load_file(path)
    if record.get("kind") != "state":
        raise UserError(f"{path} is not a training state")
    check_checkpoint(record, path)
    try:
        for name, network in networks.items():
            network.load_state_dict(_strip(f"network/{name}/", tensors))
        ema.load_state_dict(_strip("ema/", tensors))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this recipe's networks: {str(error).splitlines()[-1].strip()}") from error
    for name, optimizer in optimizers.items():
        unpack_optimizer(f"optimizer/{name}", optimizer, tensors)
    return record


def _strip(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def keep_newest(folder: Path, pattern: str, keep: int) -> None:
    """Delete all but the `keep` newest (by name) of the files that match."""
    files = sorted(folder.glob(pattern))
    for file in files[: max(len(files) - keep, 0)]:
        file.unlink()
