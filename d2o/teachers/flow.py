"""Stable Diffusion 3: a transformer trained by flow matching (Esser et al. 2024), x_t = (1 - t) x_0 + t eps, on an
autoencoder's latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2o.condition import Text
from d2o.diffusion.schedules import FlowSchedule
from d2o.errors import UserError
from d2o.networks.edm_view import EDMView
from d2o.teachers.base import Spec
from d2o.teachers.stable_diffusion import SIGMA_DATA, TextTeacher
from d2o.teachers.text import CACHE_BYTES, PromptCache, joined_states_and_t5

T5_LENGTH = 256
"""Tokens of T5, of which the published model was trained on 77 and is sampled with 256 by diffusers."""


class StableDiffusion3Teacher(TextTeacher):
    """`transformer` a diffusers SD3Transformer2DModel, which predicts the velocity eps - x_0; `vae` an AutoencoderKL;
    `text_encoders` and `tokenizers` two CLIPs and a T5, or None in its place (its states are zeros then).

    The time t is 0 .. 1. UserError: another number of text encoders.
    """

    schedule: FlowSchedule

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoders: Sequence[Any],
        tokenizers: Sequence[Any],
        schedule: FlowSchedule,
        spec: Spec,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        scaling_factor: float = 1.5305,
        shift_factor: float = 0.0609,
        t5_length: int = T5_LENGTH,
        cache_bytes: int = CACHE_BYTES,
    ):
        if len(text_encoders) != 3 or len(tokenizers) != 3 or text_encoders[0] is None or text_encoders[1] is None:
            raise UserError(
                f"{spec.name}: Stable Diffusion 3 takes two CLIP text encoders and a T5 (or None in its place)"
            )
        t5 = None if text_encoders[2] is None else (text_encoders[2], tokenizers[2])
        width = transformer.config.joint_attention_dim
        one = joined_states_and_t5(text_encoders[:2], tokenizers[:2], t5, width, t5_length, torch.device(device))
        encoders = [encoder for encoder in text_encoders if encoder is not None]
        super().__init__(
            transformer,
            vae,
            encoders,
            PromptCache(one, cache_bytes),
            width,
            True,
            scaling_factor,
            shift_factor,
            spec,
            device,
            dtype,
        )
        self.schedule = schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Text) -> Tensor:
        x_t = x_t.float()
        time = t * self.schedule.train_steps  # the network counts to 1000
        v = self.call(
            x_t,
            encoder_hidden_states=condition.states,
            pooled_projections=condition.pooled,
            timestep=time,
            return_dict=False,
        )[0]
        return x_t - t.view(-1, 1, 1, 1) * v.float()

    def edm_view(self) -> EDMView:
        schedule = {"kind": "flow", "train_steps": self.schedule.train_steps}
        return EDMView.of(self.network, schedule, "velocity", sigma_data=SIGMA_DATA)

    def _settings(self) -> dict[str, Tensor]:
        return {"schedule.flow": torch.tensor([self.schedule.shift, self.schedule.train_steps], dtype=torch.float64)}
