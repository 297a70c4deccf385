"""From a plain configuration, as recipes and checkpoints hold it, to a network."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from d2o.errors import UserError, nearest, unknown
from d2o.networks.classifier import Classifier
from d2o.networks.edm_unet import ARCHITECTURES, EDMPrecond


def build_network(config: dict[str, Any]) -> EDMPrecond | Classifier:
    """`config` holds `arch` (ddpmpp, ncsnpp, adm, classifier) and that network's arguments. UserError: unknown arch or argument, bad value."""
    config = dict(config)
    arch = config.pop("arch", None)
    if arch is None:
        raise UserError("network: no `arch` given", f"known: {', '.join([*ARCHITECTURES, 'classifier'])}")
    if arch in ARCHITECTURES:
        known = {*_arguments(EDMPrecond), *_arguments(ARCHITECTURES[arch])} - {"arch", "unet", "in_channels", "out_channels"}
    elif arch == "classifier":
        known = _arguments(Classifier)
    else:
        raise unknown("network architecture", arch, [*ARCHITECTURES, "classifier"])
    for key in config:
        if key not in known:
            near = nearest(key, known)
            advice = f"; did you mean {near!r}?" if near else ""
            raise UserError(f"network.{key}: unknown key for {arch}{advice}", f"known: {', '.join(sorted(known))}")
    try:
        return EDMPrecond(arch, **config) if arch in ARCHITECTURES else Classifier(**config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"network: cannot build {arch} from {config}: {error}") from error


def _arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)


def count_parameters(module: nn.Module) -> int:
    """All parameters, trained or not; buffers excluded."""
    return sum(p.numel() for p in module.parameters())


def set_dropout(module: nn.Module, p: float) -> None:
    """Another dropout probability in every block, and in the configuration that goes into checkpoints."""
    for part in module.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = p  # type: ignore[assignment]
    network_config(module)["dropout"] = p


def network_config(module: nn.Module) -> dict[str, Any]:
    """What `build_network` needs to build it again."""
    return module.config  # type: ignore[return-value]
