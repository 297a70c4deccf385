"""`state.safetensors`, from which a run continues bit for bit. No pickles. Of sharded players it is the record alone:
their tensors are in the files that it names (`parts`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import check_file, load_file, read_meta, save_file
from d2o.training import parts
from d2o.training.player import Player
from d2o.training.products import Products
from d2o.training.strategy import part_of
from d2o.version import __version__


def state_file(run: Path) -> Path:
    """Where the state of a run folder is."""
    return run / "checkpoints" / "state.safetensors"


def read_state(run: Path) -> JsonObject | None:
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
        if "parts" in (record := read_meta(path)):
            parts.check_bytes(path.parent, record["parts"])
    except UserError as error:
        ways = _way_on(path.with_name("last.safetensors"))
        raise UserError(error.message, f"put back a copy, if there is one; {ways}") from error
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


def settle(record: JsonObject, products: Products) -> list[str]:
    """Bring the checkpoints in the folder to what the state's record says. Returns the names of those that are
    missing."""
    parts.drop(products.folder, record.get("parts"))
    if "products" not in record:
        return products.adopt(record["images"])
    products.digests = dict(record["products"])
    return products.settle()


def tensors_of(players: Mapping[str, Player], states: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every tensor that training continues from, by name. Sharded ones are DTensors."""
    tensors: dict[str, Tensor] = {}
    for name, network in _networks(players, states).items():
        tensors |= {f"network/{name}/{key}": value for key, value in network.state_dict().items()}
    for player in players.values():
        if player.ema is not None:
            tensors |= {f"ema/{key}": value for key, value in player.ema.network.state_dict().items()}
    for name, player in players.items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in player.moments().items()}
    return tensors


def save_state(path: Path, tensors: dict[str, Tensor], record: JsonObject) -> None:
    """The commit; `record` holds the plain values (iteration, best metric, recipe...)."""
    save_file(path, tensors, {"format": "d2o", "version": 1, "kind": "state", "d2o": __version__, **record})


def load_state(path: Path, players: Mapping[str, Player], states: Mapping[str, nn.Module]) -> JsonObject:
    """Give the players and states what a state holds, whichever way it and they are divided among processes; returns
    the record. UserError when the file is not a training state or does not fit."""
    tensors, record = load_file(path)
    if record.get("kind") != "state":
        raise UserError(f"{path} is not a training state")
    check_checkpoint(record, path)
    here = tensors_of(players, states)
    parameters = {
        f"optimizer/{name}/{parameter}": p
        for name, player in players.items()
        for parameter, p in player.parameters.items()
    }
    if "parts" in record:

        def room(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
            of = here.get(name, parameters.get(name.rsplit("/", 1)[0]))
            if of is None or of.shape != size:
                return torch.empty(size, dtype=dtype)
            return torch.empty_like(of, dtype=dtype)

        tensors = parts.read_parts(path.parent, record["parts"], room)
    else:
        for name in tensors:
            of = here.get(name, parameters.get(_named(name, players)))
            if of is not None:
                tensors[name] = part_of(tensors[name], of)
    try:
        for name, network in _networks(players, states).items():
            _fill(network, _strip(f"network/{name}/", tensors))
        for name, player in players.items():
            if player.ema is not None:
                _fill(player.ema.network, _strip("ema/", tensors))
            player.load_moments(_strip(f"optimizer/{name}/", tensors))
    except (RuntimeError, LookupError) as error:
        raise UserError(f"{path} does not fit this recipe's networks: {str(error).splitlines()[-1].strip()}") from error
    return record


def _networks(players: Mapping[str, Player], states: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {**{name: player.network for name, player in players.items()}, **states}


def _named(name: str, players: Mapping[str, Player]) -> str:
    """`optimizer/<player>/<parameter>` of an optimiser's tensor; an older d2o numbered the parameters."""
    path = name.rsplit("/", 1)[0].split("/", 2)
    if path[0] == "optimizer" and len(path) == 3 and path[2].isdigit() and path[1] in players:
        names = list(players[path[1]].parameters)
        path[2] = names[int(path[2])] if int(path[2]) < len(names) else path[2]
    return "/".join(path)


def _fill(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """`load_state_dict`, told the versions of the modules: else torch takes batch norms for old ones and adds the
    counters that those lacked, which the state of frozen ones does not have either."""
    state = network.state_dict()
    own = getattr(state, "_metadata", None)
    state.clear()
    state.update(tensors)
    if own is not None:
        state._metadata = own  # type: ignore[attr-defined]
    network.load_state_dict(state)


def _strip(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
