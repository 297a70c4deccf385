"""Low-rank adapters (LoRA, Hu et al. 2021) of networks of diffusers: a layer W x becomes W x + alpha / rank B A x, of
which A and B alone are trained, averaged and stored. W stays what it was, and is in no state dict of the network's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2o.errors import UserError

if TYPE_CHECKING:
    from d2o.networks.edm_view import EDMView

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of attention, as diffusers' script for text-to-image LoRAs has them."""
PREFIX = {"UNet2DConditionModel": "unet", "SD3Transformer2DModel": "transformer"}
"""Kind of network -> what the names in diffusers' LoRA files begin with."""
_ADAPTER = "default"  # peft's name


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is one of A or B."""
    return ".lora_A." in name or ".lora_B." in name


def lora_of(network: nn.Module) -> dict[str, Any] | None:
    """The adapters that the network has: its configuration's `lora`; None: none."""
    return getattr(network, "config", {}).get("lora")


def add_lora(view: EDMView, lora: Mapping[str, Any]) -> None:
    """Give the layers whose names end in `lora["targets"]` adapters of `rank` and `alpha`, in place. A is drawn as that
    script draws it (standard deviation 1 / rank), B is 0, so that nothing changes yet. The adapters alone ask for
    gradients. UserError: peft is not installed; a target that fits no layer, or one that cannot have adapters."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"a LoRA needs the package peft ({error})", "pip install 'd2o[lora]'") from error
    names = [name for name, part in view.net.named_modules() if not list(part.children())]
    for target in lora["targets"]:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            what = f"student.lora.targets: no layer of a {view.kind} is called {target!r}"
            raise UserError(what, f"the default is [{', '.join(TARGETS)}]; layers are called like {names[-1]}")
    settings = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=list(lora["targets"]),
        init_lora_weights="gaussian",
    )
    try:
        inject_adapter_in_model(settings, view.net, _ADAPTER)
    except (ValueError, TypeError) as error:  # a normalisation, for one
        what = f"student.lora.targets: {str(error).splitlines()[0]}"
        raise UserError(what, "adapters are for linear layers and convolutions") from error
    view.config["lora"] = dict(lora)
    view.register_state_dict_post_hook(_drop_base)
    view.register_load_state_dict_pre_hook(_keep_base)


def train_lora(view: nn.Module) -> None:
    """The adapters ask for gradients; what else there is keeps its own mind: others may share it."""
    for name, p in view.named_parameters():
        if is_adapter(name):
            p.requires_grad_(True)


def _drop_base(view: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    for name in [name for name in state if name.startswith(prefix) and not is_adapter(name)]:
        del state[name]


def _keep_base(view: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """What a state dict does not hold stays as it is: the very tensors, which are not copied onto themselves."""
    for name, tensor in view.get_submodule("net").state_dict(keep_vars=True).items():
        if not is_adapter(name):
            state.setdefault(f"{prefix}net.{name}", tensor)


def merged(network: nn.Module) -> nn.Module:
    """A copy without adapters, its weights W + alpha / rank B A; a network that has none comes back as it is."""
    if lora_of(network) is None:
        return network
    from peft.tuners.tuners_utils import BaseTunerLayer

    view: Any = network
    net = copy.deepcopy(view.net)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(net.get_submodule(parent), own, layer.get_base_layer())  # type: ignore[operator]
    config = {key: value for key, value in view.config.items() if key not in ("arch", "lora")}
    return type(view)(**config, module=net).train(view.training)


def as_diffusers(view: EDMView) -> dict[str, Tensor]:
    """The adapters as diffusers' files of LoRAs hold them. Such a file has no alpha, which then is the rank: alpha /
    rank goes into B."""
    from diffusers.utils import convert_state_dict_to_diffusers

    lora = view.config["lora"]
    factor = lora["alpha"] / lora["rank"]
    tensors = {
        name.replace(f".{_ADAPTER}.", "."): p.detach() * (factor if ".lora_B." in name else 1.0)
        for name, p in view.net.named_parameters()
        if is_adapter(name)
    }
    named = convert_state_dict_to_diffusers(tensors)
    return {f"{PREFIX[view.kind]}.{name}": tensor.to(torch.float32) for name, tensor in sorted(named.items())}


def adapter_ranks(tensors: Mapping[str, Tensor]) -> Sequence[int]:
    """The ranks that a checkpoint's own tensors have."""
    return sorted({tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name and tensor.ndim > 1})
