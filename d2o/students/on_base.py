"""Networks whose checkpoint holds adapters alone (LoRA), put together with the teacher that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.interop.checkpoint_record import LoraRecord
from d2o.interop.records import check_record
from d2o.networks.budget import check_numbers
from d2o.networks.config import as_json
from d2o.networks.edm_view import EDMView
from d2o.networks.fill import fill_network
from d2o.networks.lora import adapter_ranks
from d2o.teachers.registry import load_teacher


def on_base(config: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> EDMView:
    """The network that a checkpoint describes by `config`, its other weights those of the teacher that it names, on the
    CPU. UserError: that is not here, or another one; tensors that are not the adapters'."""
    lora = config["lora"]
    check_record(LoraRecord, lora, f"{path}: network.lora", "expected a file made by `d2o`")
    check_numbers(config, f"{path}: network")
    base = lora["base"]
    if adapter_ranks(tensors) != [lora["rank"]]:
        raise UserError(f"{path}: the weights do not fit the network that the file describes (lora.rank)")
    if Path(base["name"]).is_absolute() and not Path(base["name"]).exists():
        what = f"{path} holds a LoRA, changes of the weights of {base['name']}, and nothing is there"
        raise UserError(what, "put back the teacher that it was trained with")
    try:
        teacher = load_teacher(base["name"])
    except UserError as error:
        what = f"{path} holds a LoRA, changes of the weights of {base['name']}: {error.message}"
        raise UserError(what, error.hint) from error
    found = teacher.record
    if base.get("sha256") and base["sha256"] != found["sha256"]:
        revision = f", revision {base['revision']}" if base.get("revision") else ""
        wanted, here = base["sha256"][:12], found["sha256"][:12]
        raise UserError(
            f"{path} holds a LoRA, changes of the weights of {base['name']}{revision} with sha256 {wanted}; those here"
            f" have {here}",
            "put the teacher that it was trained with in its place",
        )
    view = teacher.edm_view()
    if not isinstance(view, EDMView) or not _same(dict(view.config), config):
        raise UserError(f"{path} describes another network than that of {base['name']}", "copy or make it again")
    given = {key: value for key, value in config.items() if key not in ("arch", "net")}
    try:
        with torch.random.fork_rng(devices=[]):  # the numbers that adapters begin with are drawn, and not used
            network = EDMView(net=config["net"], **given, module=view.net)
    except TypeError as error:
        raise UserError(f"{path} describes its network by what this d2o does not know ({error})") from error
    return fill_network(network, tensors, path)


def _same(found: dict[str, Any], told: dict[str, Any]) -> bool:
    """Whether two configurations are of the same teacher, as far as both versions of diffusers state it."""
    theirs, ours = as_json(found["net"]), told.get("net")
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return False
    if any(theirs[key] != value for key, value in ours.items() if key in theirs):
        return False
    return all(as_json(found.get(key)) == told.get(key) for key in ("schedule", "prediction", "time_ids"))
