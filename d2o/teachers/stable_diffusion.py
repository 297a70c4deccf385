"""Stable Diffusion 1, 2 and XL: a UNet with cross-attention to text, on an autoencoder's latents (Rombach et al. 2022;
Podell et al. 2023)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.condition import Condition, Embedded, Text
from d2o.data.pair_settings import SDXL_UNCOND
from d2o.diffusion.guidance import guide, no_guidance
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError, unknown
from d2o.interop.safetensors_io import tensors_sha256
from d2o.networks.edm_view import EDMView
from d2o.spaces.base import LatentSpace
from d2o.spaces.load import keep_space
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.cross_attention import (
    GivenText,
    Prepared,
    given_text,
    once_for_both_halves,
    shared_layers,
    text_attentions,
)
from d2o.teachers.prediction import check_prediction, to_data
from d2o.teachers.text import TextEncoders, check_text, embed_prompts, keep_text

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SIGMA_DATA = 1.0
"""Standard deviation of latents, which their scaling factor is there for (Rombach et al. 2022, appendix G)."""


class TextTeacher(Teacher):
    """What teachers with prompts share: `embed`, the checks of a condition, the empty prompt, `decode` through the
    autoencoder."""

    def __init__(
        self,
        network: nn.Module,
        space: LatentSpace,
        text: TextEncoders,
        width: int,
        pooled: bool,
        spec: Spec,
        device: str | torch.device,
        dtype: torch.dtype | None,
    ):
        if space.numbers.channels != spec.shape[0]:
            raise UserError(
                f"{spec.name}: a network for {spec.shape[0]} channels with an autoencoder of {space.numbers.channels}"
            )
        super().__init__(network, replace(spec, space=space.name, text=text.name), device, dtype)
        self._space, self.text = keep_space(space), keep_text(text)
        self.prompts, self.width, self.pooled = text.prompts, width, pooled

    def embed(self, condition: Condition | Embedded) -> Embedded:
        """Prompts -> Text on the teacher's device, float32, cut after 77 tokens. UserError: class labels, or
        nothing."""
        return embed_prompts(self.spec, condition, lambda prompts: self.text(prompts).to(self.device))

    def expect_prompts(self, repeated: bool) -> None:
        self.prompts.limit = self.prompts.usual if repeated else 0

    @property
    def empty(self) -> Text:
        """What guidance takes for no prompt, of length 1."""
        return self.prompts.empty

    def unconditional(self, embedded: Embedded) -> Text:
        assert isinstance(embedded, Text)
        empty, rows = self.empty.to(self.device), len(embedded)
        return Text(empty.states.expand(rows, -1, -1), None if empty.pooled is None else empty.pooled.expand(rows, -1))

    def check_condition(self, embedded: Embedded, batch: int) -> Text:
        """UserError: no encoded prompts, another number than the batch, states of another network."""
        name, text = self.spec.name, check_text(self.spec, embedded, batch)
        if text.states.ndim != 3 or text.states.shape[-1] != self.width:
            raise UserError(
                f"{name!r} takes text states [B, L, {self.width}], not {list(text.states.shape)}; they are another"
                " teacher's"
            )
        if self.pooled and text.pooled is None:
            raise UserError(f"{name!r} takes a pooled vector of each prompt as well; this text has none")
        return text

    @property
    def fingerprint(self) -> str:
        """sha256 over all that samples depend on: the weights of the network and the text encoders, the schedule, the
        kind of prediction."""
        if not hasattr(self, "_fingerprint"):
            parts = {f"network.{key}": value for key, value in self.network.state_dict().items()}
            self._fingerprint = tensors_sha256(parts | self.text.weights() | self._settings())
        return self._fingerprint

    def _settings(self) -> dict[str, Tensor]:
        return {}


class StableDiffusionTeacher(TextTeacher):
    """`unet` a diffusers UNet2DConditionModel, `space` that of its latents, `text` one text encoder (1.x, 2.x) or two
    (XL).

    The time t is 0 .. 999. `prediction` is what the UNet gives: "epsilon", "v_prediction" or "sample". `sdxl_uncond`:
    what XL's guidance takes
    for "no prompt": "zeros", all-zero states (diffusers' force_zeros_for_empty_prompt), or "encode_empty", the encoded
    empty prompt. `sample` spares work that is the same in every step, see `cross_attention`. UserError: unknown
    prediction, components that do not fit.
    """

    schedule: DiscreteSchedule

    def __init__(
        self,
        unet: UNet2DConditionModel,
        space: LatentSpace,
        text: TextEncoders,
        schedule: DiscreteSchedule,
        spec: Spec,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        prediction: str = "epsilon",
        sdxl_uncond: str = "zeros",
    ):
        if sdxl_uncond not in SDXL_UNCOND:
            raise unknown("sdxl_uncond", sdxl_uncond, SDXL_UNCOND)
        self.xl = len(text.encoders) == 2
        if self.xl != (unet.config.addition_embed_type == "text_time"):
            raise UserError(
                f"{spec.name}: a UNet of Stable Diffusion {'1 or 2' if self.xl else 'XL'} with {len(text.encoders)}"
                " text encoders"
            )
        width = unet.config.cross_attention_dim
        if not isinstance(width, int):
            raise UserError(
                f"{spec.name}: a UNet with text of several widths (cross_attention_dim {list(width)}), which d2o does"
                " not support"
            )
        super().__init__(unet, space, text, width, self.xl, spec, device, dtype)
        self.schedule, self.prediction, self.sdxl_uncond = schedule, check_prediction(prediction), sdxl_uncond
        self._attentions = text_attentions(unet)
        self._given = [GivenText() for _ in self._attentions or []]
        self._shared = [] if self._attentions is None else shared_layers(unet)
        _, height, width = space.image_shape(spec.shape)
        # XL is told the size of the image that it was cut from, where it was cut, and its own size: a full image at the
        # usual resolution.
        self.sizes = [float(number) for number in (height, width, 0, 0, height, width)]
        self.time_ids = torch.tensor([self.sizes], dtype=torch.float32, device=self.device)

    def predict(self, x_t: Tensor, t: Tensor, condition: Embedded) -> Tensor:
        assert isinstance(condition, Text)
        added = (
            {"text_embeds": condition.pooled, "time_ids": self.time_ids.expand(len(condition), -1)} if self.xl else None
        )
        x_t = x_t.float()
        with ExitStack() as stack:
            if isinstance(condition, Prepared):
                stack.enter_context(given_text(self._attentions or [], self._given, condition))
                if condition.empty is not None and self.call is self.network:  # compilers make little of the hooks
                    stack.enter_context(once_for_both_halves(self._shared))
            # Whole numbers: in half precision 999 would become 1000.
            out = self.call(x_t, t.round().long(), condition.states, added_cond_kwargs=added, return_dict=False)[0]
        return to_data(self.prediction, out, x_t, t, self.schedule)

    def prepare(self, embedded: Embedded) -> Embedded:
        plain = self.network._compiled_call_impl is not None or self._attentions is None
        return Prepared(embedded) if not plain and isinstance(embedded, Text) else embedded

    def guided(
        self, x_t: Tensor, t: Tensor | float, condition: Condition | Embedded = None, cfg: float | Tensor = 1.0
    ) -> Tensor:
        if no_guidance(cfg) or not isinstance(condition, Prepared):
            return super().guided(x_t, t, condition, cfg)
        t = torch.as_tensor(t, device=x_t.device, dtype=torch.float32).expand(len(x_t))
        both = condition.guided(self.empty)
        d_c, d_u = self.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return guide(d_c, d_u, cfg)

    def edm_view(self) -> EDMView:
        ids = self.sizes if self.xl else None
        return EDMView.of(self.network, self.schedule.record(), self.prediction, sigma_data=SIGMA_DATA, time_ids=ids)

    @property
    def empty(self) -> Text:
        """What guidance takes for no prompt, of length 1."""
        found = self.prompts.empty
        if not self.xl or self.sdxl_uncond == "encode_empty":
            return found
        assert found.pooled is not None
        return Text(torch.zeros_like(found.states), torch.zeros_like(found.pooled))

    def _settings(self) -> dict[str, Tensor]:
        return {f"schedule.{self.prediction}": self.schedule.alphas_cumprod}
