"""Pixel-space UNets of diffusers (UNet2DModel: DDPM and its descendants), unconditional or by class (Ho et al. 2020;
Nichol and Dhariwal 2021)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2o.condition import Embedded
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError
from d2o.interop.safetensors_io import tensors_sha256
from d2o.networks.edm_view import EDMView
from d2o.teachers.base import Spec, Teacher, check_labels
from d2o.teachers.prediction import check_prediction, to_data

if TYPE_CHECKING:
    from diffusers import UNet2DModel

SIGMA_DATA = 0.5
"""Standard deviation of images in [-1, 1], as EDM has it."""


class UNet2DTeacher(Teacher):
    """`unet` a diffusers UNet2DModel; the time t is 0 .. 999; `prediction` is what it gives: "epsilon", "v_prediction"
    or "sample".

    `clip`: its prediction of x_0 is clipped to [-clip, clip] (diffusers' clip_sample), and the noise that a step takes
    follows from the clipped one (diffusers' use_clipped_model_output; DDPM's own steps too). A network that predicts a
    variance as well has 2 C output channels, the second half of which is not used. UserError: an unknown prediction,
    channels that do not fit.
    """

    schedule: DiscreteSchedule

    def __init__(
        self,
        unet: UNet2DModel,
        schedule: DiscreteSchedule,
        spec: Spec,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        prediction: str = "epsilon",
        clip: float | None = None,
    ):
        super().__init__(unet, replace(spec, guidable=False), device, dtype)
        self.schedule, self.prediction, self.clip = schedule, check_prediction(prediction), clip
        channels, out = unet.config.in_channels, unet.config.out_channels
        if out not in (channels, 2 * channels):
            raise UserError(
                f"{spec.name}: a UNet with {channels} input and {out} output channels; expected {channels} or"
                f" {2 * channels}"
            )

    def predict(self, x_t: Tensor, t: Tensor, condition: Embedded) -> Tensor:
        x_t = x_t.float()
        out = self.call(x_t, t.round().long(), class_labels=condition, return_dict=False)[0][:, : x_t.shape[1]]
        x = to_data(self.prediction, out, x_t, t, self.schedule)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def edm_view(self) -> EDMView:
        """Without the clipping, which is the solvers', not the network's."""
        return EDMView.of(self.network, self.schedule.record(), self.prediction, sigma_data=SIGMA_DATA)

    def check_condition(self, embedded: Embedded, batch: int) -> Tensor | None:
        """As for any teacher by class, but these networks have no class for "none": UserError where one is asked
        for."""
        labels = check_labels(self.spec, embedded, batch)
        if labels is not None and labels.device.type == "cpu" and labels.numel() and int(labels.min()) < 0:
            raise UserError(
                f"{self.spec.name!r} was trained with a class for every image; it has none for 'no class' (-1)"
            )
        return labels

    @property
    def fingerprint(self) -> str:
        """sha256 over all that samples depend on: the weights, the schedule, the kind of prediction, the clipping."""
        if not hasattr(self, "_fingerprint"):
            settings = {f"schedule.{self.prediction}.clip={self.clip}": self.schedule.alphas_cumprod}
            self._fingerprint = tensors_sha256(
                {f"network.{key}": value for key, value in self.network.state_dict().items()} | settings
            )
        return self._fingerprint
