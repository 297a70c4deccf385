"""`state.safetensors`, from which a run continues bit for bit. No pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import check_file, load_file, read_meta, save_file
from d2o.training.products import Products
from d2o.version import __version__


def state_file(run: Path) -> Path:
    """Where the state of a run folder is."""
    return run / "checkpoints" / "state.safetensors"


def read_state(run: Path) -> dict[str, Any] | None:
    """The record of a run's state, after a look at all of its bytes; None: nothing was saved yet. UserError: it is
    damaged (and what is left to do), or there are checkpoints without one."""
    path = state_file(run)
    if not path.exists():
        if found := sorted(path.parent.glob("*.safetensors")):
            names = ", ".join(file.name for file in found)
            what = f"{run} has checkpoints ({names}) and no {path.name} to continue from"
            raise UserError(what, f"put it back; {_from(found[-1])}; or choose another --out")
        return None
    try:
        check_file(path)
    except UserError as error:
        ways = _way_on(path.with_name("last.safetensors"))
        raise UserError(error.message, f"put back a copy, if there is one; {ways}") from error
    record = read_meta(path)
    if record.get("kind") != "state":
        raise UserError(f"{path} is not a training state", "choose another --out")
    return check_checkpoint(record, path)


def _way_on(last: Path) -> str:
    try:
        check_file(last)
    except UserError:
        return "or start anew with another --out"
    return f"{_from(last)}; or start anew with another --out"


def _from(checkpoint: Path) -> str:
    if read_meta(checkpoint).get("kind") != "student":
        return f"{checkpoint} itself can be used as it is"
    return f"train its student further, as a run of its own: d2o finetune RECIPE --from {checkpoint} --out ANOTHER"


def settle(run: Path, record: dict[str, Any], products: Products) -> list[str]:
    """Bring the checkpoints in the folder to what the state's record says. Returns the names of those that are
    missing."""
    if "products" not in record:
        return products.adopt(record["images"])
    products.digests = dict(record["products"])
    return products.settle()


def pack_optimizer(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's tensors by position of the parameter: `<prefix>/<index>/<key>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{index}/{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def unpack_optimizer(prefix: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "/"):
            _, index, key = name.rsplit("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_state(
    path: Path,
    networks: dict[str, nn.Module],
    ema: nn.Module,
    optimizers: dict[str, torch.optim.Optimizer],
    record: dict[str, Any],
) -> None:
    """Everything that training continues from; `record` holds the plain values (iteration, best metric, recipe...)."""
    tensors: dict[str, Tensor] = {}
    for name, network in networks.items():
        tensors |= {f"network/{name}/{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"ema/{key}": value for key, value in ema.state_dict().items()}
    for name, optimizer in optimizers.items():
        tensors |= pack_optimizer(f"optimizer/{name}", optimizer)
    save_file(path, tensors, {"format": "d2o", "version": 1, "kind": "state", "d2o": __version__, **record})


def load_state(
    path: Path, networks: dict[str, nn.Module], ema: nn.Module, optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, Any]:
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
