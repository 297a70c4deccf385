"""A text-to-image model that d2o trained itself, as a teacher: the same class as Stable Diffusion's."""

from __future__ import annotations

import torch

from d2o.diffusion.schedules import DiscreteSchedule
from d2o.networks.latent import SD_SCHEDULER, TextToImage
from d2o.teachers.base import Spec
from d2o.teachers.stable_diffusion import StableDiffusionTeacher


def text_to_image_teacher(
    model: TextToImage, spec: Spec, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> StableDiffusionTeacher:
    """The model's parts, frozen, behind the teacher contract."""
    return StableDiffusionTeacher(
        model.unet,
        model.vae,
        [model.text_encoder],
        [model.tokens.tokenizer],
        DiscreteSchedule.from_config(SD_SCHEDULER),
        spec,
        device,
        dtype,
        scaling_factor=model.scale,
    )
