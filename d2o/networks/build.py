"""From a plain configuration, as recipes and checkpoints hold it, to a network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from d2o.errors import UserError, nearest, unknown
from d2o.networks.budget import build_within, check_numbers
from d2o.networks.classifier import Classifier
from d2o.networks.config import Config
from d2o.networks.edm2_unet import EDM2_SIZES, EDM2Precond, UNet
from d2o.networks.edm_unet import ARCHITECTURES, EDMPrecond
from d2o.networks.edm_view import EDMView
from d2o.networks.free_latents import FreeLatents
from d2o.networks.latent import BROKEN, Autoencoder, TextToImage
from d2o.networks.latent_vgg import TunedVGG
from d2o.networks.ncsnpp_z import DDGANGenerator
from d2o.networks.style_generator import StyleGenerator
from d2o.networks.vgg_classifier import LatentClassifier
from d2o.settings.wording import show

PLAIN: Mapping[str, Callable[..., Any]] = {
    "classifier": Classifier,
    "ddgan": DDGANGenerator,
    "latent_classifier": LatentClassifier,
    "latent_lpips": TunedVGG,
    "free_latents": FreeLatents,
    "style_generator": StyleGenerator,
}
"""arch -> the one class that takes the other keys."""
FAMILIES = (*ARCHITECTURES, "edm2", "edm_view", "autoencoder_kl", "text_to_image")
NETWORKS = (*FAMILIES, *PLAIN)


Network = (
    EDMPrecond
    | EDM2Precond
    | EDMView
    | Classifier
    | DDGANGenerator
    | StyleGenerator
    | LatentClassifier
    | TunedVGG
    | FreeLatents
    | Autoencoder
    | TextToImage
)


def build_network(
    config: Config,
    holds: Mapping[str, Tensor] | None = None,
    where: str = "network",
    plain: Mapping[str, Callable[..., Any]] = PLAIN,
) -> Network:
    """`config` holds `arch` (one of `NETWORKS`) and that network's arguments.

    edm2 also takes `preset`, one of the published sizes xxs to xxl, whose width and dropout other keys may replace.
    `plain`: the classes that take the other keys as they are; critics have others (`d2o.critics.build`). `holds`: the
    tensors of the file that `config` is from (`where`), which must be the network's. UserError: unknown
    arch, preset or argument, bad value; a network that does not fit `holds`, or this machine. Nothing is allocated
    before that is known.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected a section with `arch`, got {show(config)}")
    check_numbers(config, where)
    return build_within(lambda: _build(config, plain), holds, where)


def _build(config: Config, plain: Mapping[str, Callable[..., Any]]) -> Network:
    config, known_archs = dict(config), (*FAMILIES, *plain)
    arch = config.pop("arch", None)
    if arch is None:
        raise UserError("network: no `arch` given", f"known: {', '.join(known_archs)}")
    if not isinstance(arch, str) or arch not in known_archs:
        raise unknown("network architecture", arch, known_archs)
    if arch in ARCHITECTURES:
        known = _arguments(EDMPrecond, ARCHITECTURES[arch]) - {"arch", "in_channels", "out_channels"}
    elif arch == "edm2":
        known = _arguments(EDM2Precond, UNet) | {"preset"}
    elif arch == "edm_view":
        known = _arguments(EDMView) - {"module"}
    elif arch == "text_to_image":
        known = _arguments(TextToImage) | {"unet"}
    elif arch == "autoencoder_kl":
        known = set(config)  # it checks its arguments itself: they are those of diffusers
    else:
        known = _arguments(plain[arch])
    for key in config:
        if key not in known:
            near = nearest(key, known)
            advice = f"; did you mean {near!r}?" if near else ""
            raise UserError(f"network.{key}: unknown key for {arch}{advice}", f"known: {', '.join(sorted(known))}")
    _check_types(arch, config, plain)
    if arch == "edm2" and (preset := config.pop("preset", None)) is not None:
        if not isinstance(preset, str) or preset not in EDM2_SIZES:
            raise unknown("network.preset", preset, EDM2_SIZES)
        config = {**EDM2_SIZES[preset], **config}
    try:
        if arch in ARCHITECTURES:
            return EDMPrecond(arch, **config)
        if arch == "edm_view":
            return EDMView(**config)
        if arch == "text_to_image":
            return TextToImage(**config)
        if arch == "autoencoder_kl":
            return Autoencoder(**config)
        return EDM2Precond(**config) if arch == "edm2" else plain[arch](**config)
    except BROKEN as error:
        raise UserError(f"network: cannot build {arch} from {config}: {error or type(error).__name__}") from error


TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}


def _check_types(arch: str, config: Config, plain: Mapping[str, Callable[..., Any]]) -> None:
    """UserError: an argument that is one number, word or switch is given as something else. (Of others the networks
    themselves know.)"""
    described = {name: (EDMPrecond, cls) for name, cls in ARCHITECTURES.items()}
    classes = {**described, "edm2": (EDM2Precond, UNet), "edm_view": (EDMView,)}.get(arch, (plain.get(arch),))
    stated = {
        name: parameter.annotation
        for cls in classes
        if cls
        for name, parameter in inspect.signature(cls).parameters.items()
    }
    for key, value in config.items():
        kinds, words = TYPES.get(stated.get(key, ""), ((object,), ""))
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds not in ((bool,), (object,))):
            raise UserError(f"network.{key}: expected {words}, got {show(value)}")
        if isinstance(value, float) and stated.get(key) == "float" and not math.isfinite(value):
            raise UserError(f"network.{key}: expected a finite number, got {value}")


def _arguments(*classes: Callable[..., object]) -> set[str]:
    return {name for cls in classes for name in inspect.signature(cls).parameters} - {"unet"}


def count_parameters(module: nn.Module) -> int:
    """All parameters, trained or not; buffers excluded."""
    return sum(p.numel() for p in module.parameters())


def set_dropout(module: nn.Module, p: float) -> None:
    """Another dropout probability in every block, and in the configuration that goes into checkpoints."""
    for part in module.modules():
        if isinstance(part, EDMView) or isinstance(vars(part).get("dropout"), float):
            part.dropout = p  # type: ignore[assignment]
    network_config(module)["dropout"] = p


def set_checkpointing(module: nn.Module, on: bool) -> bool:
    """Recompute activations in the backward pass instead of keeping them, in every part that has a switch
    `checkpointing`.

    False: no part has one.
    """
    parts = [part for part in module.modules() if isinstance(getattr(part, "checkpointing", None), bool)]
    for part in parts:
        part.checkpointing = on  # type: ignore[assignment]
    return bool(parts)


def network_config(module: nn.Module) -> Config:
    """What `build_network` needs to build it again."""
    return module.config  # type: ignore[return-value]
