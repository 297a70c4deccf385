"""Stable Diffusion 3: a transformer trained by flow matching (Esser et al. 2024), x_t = (1 - t) x_0 + t eps, on an
autoencoder's latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2o.condition import Embedded, Text
from d2o.diffusion.schedules import FlowSchedule
from d2o.networks.edm_view import EDMView
from d2o.spaces.base import LatentSpace
from d2o.teachers.base import Spec
from d2o.teachers.stable_diffusion import SIGMA_DATA, TextTeacher
from d2o.teachers.text import TextEncoders

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel


class StableDiffusion3Teacher(TextTeacher):
    """`transformer` a diffusers SD3Transformer2DModel, which predicts the velocity eps - x_0; `space` that of its
    latents; `text` its text encoders. The time t is 0 .. 1.
    """

    schedule: FlowSchedule

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        space: LatentSpace,
        text: TextEncoders,
        schedule: FlowSchedule,
        spec: Spec,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ):
        super().__init__(transformer, space, text, transformer.config.joint_attention_dim, True, spec, device, dtype)
        self.schedule = schedule

    def predict(self, x_t: Tensor, t: Tensor, condition: Embedded) -> Tensor:
        assert isinstance(condition, Text)
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
