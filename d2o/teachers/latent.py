"""A text-to-image model that d2o trained itself, as a teacher: the same class as Stable Diffusion's."""

from __future__ import annotations

import torch

from d2o.diffusion.schedules import DiscreteSchedule
from d2o.networks.latent import SD_SCHEDULER, TextToImage
from d2o.spaces.base import UNNAMED, LatentSpace
from d2o.teachers.base import Spec
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.teachers.text import clip_text


def text_to_image_teacher(
    model: TextToImage, spec: Spec, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> StableDiffusionTeacher:
    """The model's parts, frozen, behind the teacher contract."""
    return StableDiffusionTeacher(
        model.unet,
        LatentSpace.of(spec.space if spec.latent else UNNAMED, model.vae, device),
        clip_text(spec.text or spec.name, [model.text_encoder], [model.tokens.tokenizer], device),
        DiscreteSchedule.from_config(SD_SCHEDULER),
        spec,
        device,
        dtype,
    )
