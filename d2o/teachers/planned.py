"""Published teachers without their weights, on the meta device: what a plan needs of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from d2o.condition import Text
from d2o.diffusion.schedules import DiscreteSchedule, FlowSchedule
from d2o.interop.catalogue import Published
from d2o.networks.build import build_network
from d2o.networks.latent import SD_SCHEDULER
from d2o.networks.precond import Denoiser
from d2o.spaces.load import SPACES, load_space
from d2o.teachers import published_configs as parts
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.diffusers_parts import quiet
from d2o.teachers.flow import StableDiffusion3Teacher
from d2o.teachers.registry import edm_family
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.teachers.text import T5_LENGTH, TextEncoders

META = torch.device("meta")


def planned_teacher(published: Published) -> Teacher:
    """The teacher with all its networks on the meta device. Its text encoders make states of the right shape."""
    if published.network is None:
        with quiet():
            return TEXT_TEACHERS[published.name](published)
    with META:
        network = build_network(published.network)
    assert isinstance(network, Denoiser)
    frozen = network.eval().requires_grad_(False)
    return edm_family(frozen, published.network, published.name, published.steps, published.space, META, None)


def _sd15(published: Published) -> Teacher:
    from diffusers import UNet2DConditionModel

    with META:
        unet = UNet2DConditionModel.from_config(parts.SD15_UNET)
        encoders = [_clip(parts.CLIP_L, projected=False)]
    return _stable_diffusion(published, unet, _text(published, encoders, 77, 768, None))


def _sdxl(published: Published) -> Teacher:
    from diffusers import UNet2DConditionModel

    with META:
        unet = UNet2DConditionModel.from_config(parts.SDXL_UNET)
        encoders = [_clip(parts.CLIP_L, projected=False), _clip(parts.CLIP_G, projected=True)]
    return _stable_diffusion(published, unet, _text(published, encoders, 77, 2048, 1280))


def _stable_diffusion(published: Published, unet: nn.Module, text: TextEncoders) -> Teacher:
    schedule = DiscreteSchedule.from_config(SD_SCHEDULER)
    return StableDiffusionTeacher(unet, load_space(published.space, META), text, schedule, _spec(published), META)


def _sd3(published: Published) -> Teacher:
    from diffusers import SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel

    with META:
        transformer = SD3Transformer2DModel.from_config(parts.SD3_TRANSFORMER)
        encoders = [_clip(config, projected=True) for config in (parts.CLIP_L, parts.CLIP_G)]
        encoders.append(T5EncoderModel(T5Config(**parts.T5_XXL)))
    text = _text(published, encoders, 77 + T5_LENGTH, 4096, 2048)
    space, schedule = load_space(published.space, META), FlowSchedule(parts.SD3_SHIFT)
    return StableDiffusion3Teacher(transformer, space, text, schedule, _spec(published), META)


TEXT_TEACHERS: dict[str, Callable[[Published], Teacher]] = {"sd15": _sd15, "sdxl": _sdxl, "sd3-medium": _sd3}
"""By the catalogue's name: those whose networks are made of several files."""


def _clip(config: dict[str, object], projected: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config))


def _text(published: Published, encoders: list[nn.Module], length: int, width: int, pooled: int | None) -> TextEncoders:
    def encode(prompt: str) -> Text:
        vector = None if pooled is None else torch.empty(1, pooled, device=META)
        return Text(torch.empty(1, length, width, device=META), vector)

    return TextEncoders(published.name, encoders, encode, META, revision=published.revision)


def _spec(published: Published) -> Spec:
    numbers = SPACES[published.space]
    side = published.resolution // numbers.factor
    return Spec(
        published.name,
        (numbers.channels, side, side),
        condition="text",
        licence=published.licence,
        solver=published.solver,
        steps=published.steps,
    )
