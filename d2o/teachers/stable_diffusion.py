"""Stable Diffusion 1, 2 and XL: a UNet with cross-attention to text, on an autoencoder's latents (Rombach et al. 2022;
Podell et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2o.condition import Condition, Embedded, Text
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError, unknown
from d2o.interop.safetensors_io import tensors_sha256
from d2o.networks.edm_view import EDMView
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
from d2o.teachers.text import CACHE_BYTES, PromptCache, embed_prompts, joined_states, last_states
from d2o.teachers.vae import decode

SIGMA_DATA = 1.0
"""Standard deviation of latents, which their scaling factor is there for (Rombach et al. 2022, appendix G)."""
SDXL_UNCOND = ("zeros", "encode_empty")


class TextTeacher(Teacher):
    """What teachers with prompts share: `embed`, the checks of a condition, the empty prompt, `decode` through the
    autoencoder."""

    def __init__(
        self,
        network: nn.Module,
        vae: Any,
        text_encoders: Sequence[nn.Module],
        prompts: PromptCache,
        width: int,
        pooled: bool,
        scaling_factor: float,
        shift_factor: float,
        spec: Spec,
        device: str | torch.device,
        dtype: torch.dtype | None,
    ):
        if vae.config.latent_channels != spec.shape[0]:
            raise UserError(
                f"{spec.name}: a network for {spec.shape[0]} channels with an autoencoder of"
                f" {vae.config.latent_channels}"
            )
        super().__init__(network, spec, device, dtype)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.text_encoders = [encoder.to(self.device).eval().requires_grad_(False) for encoder in text_encoders]
        self.prompts, self.width, self.pooled = prompts, width, pooled
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor

    def embed(self, condition: Condition | Embedded) -> Embedded:
        """Prompts -> Text on the teacher's device, float32, cut after 77 tokens. UserError: class labels, or
        nothing."""
        return embed_prompts(self.spec, condition, self.prompts)

    def expect_prompts(self, repeated: bool) -> None:
        self.prompts.limit = self.prompts.usual if repeated else 0

    @property
    def empty(self) -> Text:
        """What guidance takes for no prompt, of length 1."""
        return self.prompts.empty

    def unconditional(self, embedded: Any) -> Text:
        empty, rows = self.empty, len(embedded)
        return Text(empty.states.expand(rows, -1, -1), None if empty.pooled is None else empty.pooled.expand(rows, -1))

    def check_condition(self, text: Any, batch: int) -> Any:
        """UserError: no encoded prompts, another number than the batch, states of another network."""
        name = self.spec.name
        if not isinstance(text, Text):
            raise UserError(f"{name!r} is conditioned on text; it takes prompts, '' for none")
        if len(text) != batch:
            raise UserError(f"{len(text)} prompts for a batch of {batch}")
        if text.states.ndim != 3 or text.states.shape[-1] != self.width:
            raise UserError(
                f"{name!r} takes text states [B, L, {self.width}], not {list(text.states.shape)}; they are another"
                " teacher's"
            )
        if self.pooled and text.pooled is None:
            raise UserError(f"{name!r} takes a pooled vector of each prompt as well; this text has none")
        return text

    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, h, w] in the diffusion space -> images [B, 3, H, W] in [-1, 1], float32."""
        return decode(self.vae, x, self.scaling_factor, self.shift_factor)

    @property
    def fingerprint(self) -> str:
        """sha256 over all that samples depend on: the weights of the network and the text encoders, the schedule, the
        kind of prediction."""
        if not hasattr(self, "_fingerprint"):
            parts = {f"network.{key}": value for key, value in self.network.state_dict().items()}
            for i, encoder in enumerate(self.text_encoders):
                parts |= {f"text{i}.{key}": value for key, value in encoder.state_dict().items()}
            self._fingerprint = tensors_sha256(parts | self._settings())
        return self._fingerprint

    def _settings(self) -> dict[str, Tensor]:
        return {}


class StableDiffusionTeacher(TextTeacher):
    """`unet` a diffusers UNet2DConditionModel, `vae` an AutoencoderKL, `text_encoders` and `tokenizers` one each (1.x,
    2.x) or two (XL).

    The time t is 0 .. 999. `prediction` is what the UNet gives: "epsilon", "v_prediction" or "sample". `sdxl_uncond`:
    what XL's guidance takes
    for "no prompt": "zeros", all-zero states (diffusers' force_zeros_for_empty_prompt), or "encode_empty", the encoded
    empty prompt. `sample` spares work that is the same in every step, see `cross_attention`. UserError: unknown
    prediction, components that do not fit.
    """

    schedule: DiscreteSchedule

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoders: Sequence[Any],
        tokenizers: Sequence[Any],
        schedule: DiscreteSchedule,
        spec: Spec,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        prediction: str = "epsilon",
        scaling_factor: float = 0.18215,
        shift_factor: float = 0.0,
        sdxl_uncond: str = "zeros",
        cache_bytes: int = CACHE_BYTES,
    ):
        if sdxl_uncond not in SDXL_UNCOND:
            raise unknown("sdxl_uncond", sdxl_uncond, SDXL_UNCOND)
        self.xl = len(text_encoders) == 2
        if self.xl != (unet.config.addition_embed_type == "text_time"):
            raise UserError(
                f"{spec.name}: a UNet of Stable Diffusion {'1 or 2' if self.xl else 'XL'} with {len(text_encoders)}"
                " text encoders"
            )
        on = torch.device(device)
        one = (
            joined_states(text_encoders, tokenizers, on)
            if self.xl
            else last_states(text_encoders[0], tokenizers[0], on)
        )
        width = unet.config.cross_attention_dim
        if not isinstance(width, int):
            raise UserError(
                f"{spec.name}: a UNet with text of several widths (cross_attention_dim {list(width)}), which d2o does"
                " not support"
            )
        super().__init__(
            unet,
            vae,
            text_encoders,
            PromptCache(one, cache_bytes),
            width,
            self.xl,
            scaling_factor,
            shift_factor,
            spec,
            device,
            dtype,
        )
        self.schedule, self.prediction, self.sdxl_uncond = schedule, check_prediction(prediction), sdxl_uncond
        self._attentions = text_attentions(unet)
        self._given = [GivenText() for _ in self._attentions or []]
        self._shared = [] if self._attentions is None else shared_layers(unet)
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = spec.shape[1] * scale, spec.shape[2] * scale
        # XL is told the size of the image that it was cut from, where it was cut, and its own size: a full image at the
        # usual resolution.
        self.time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device)

    def predict(self, x_t: Tensor, t: Tensor, condition: Text | Prepared) -> Tensor:
        text = condition.text if isinstance(condition, Prepared) else condition
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
            out = self.call(x_t, t.round().long(), text.states, added_cond_kwargs=added, return_dict=False)[0]
        return to_data(self.prediction, out, x_t, t, self.schedule)

    def prepare(self, embedded: Any) -> Any:
        plain = self.network._compiled_call_impl is not None or self._attentions is None
        return Prepared(embedded) if not plain and isinstance(embedded, Text) else embedded

    def guided(
        self, x_t: Tensor, t: Tensor | float, condition: Condition | Embedded | Prepared = None, cfg: float = 1.0
    ) -> Tensor:
        if cfg == 1.0 or not isinstance(condition, Prepared):
            return super().guided(x_t, t, cast("Embedded", condition), cfg)
        t = torch.as_tensor(t, device=x_t.device, dtype=torch.float32).expand(len(x_t))
        both = cast("Embedded", condition.guided(self.empty))
        d_c, d_u = self.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return torch.lerp(d_u, d_c, cfg)

    def edm_view(self) -> EDMView:
        ids = self.time_ids[0].tolist() if self.xl else None
        return EDMView.of(self.network, self.schedule.record(), self.prediction, sigma_data=SIGMA_DATA, time_ids=ids)

    def check_condition(self, text: Any, batch: int) -> Any:
        return text if isinstance(text, Prepared) else super().check_condition(text, batch)

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
