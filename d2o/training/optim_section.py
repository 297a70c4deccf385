"""`optim:` of a recipe, and `optim_critic:`, read by `optim`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from d2o.settings.section import Beta, NonEmpty, Positive, Section, field
from d2o.settings.wording import show


class OptimSection(Section):
    """An optimiser and its learning rate."""

    name: Literal["adam", "adamw", "radam", "sgd"] = field("adam", "optimiser")
    state: Literal["fp32", "8bit"] = field(
        "fp32",
        "how the two moments are kept: fp32, or 8bit, a quarter of the memory (adam and adamw; pip install"
        " 'd2o[8bit]'; of processes that hold all of a network)",
    )
    lr: Positive = field(..., "learning rate, the highest of the schedule")
    betas: tuple[Beta, Beta] = field(
        (0.9, 0.999), "decay of the two moments, per iteration; sgd: the first is its momentum (default [0.9, 0.999])"
    )
    eps: Positive = field(1e-8, "added to the denominator")
    weight_decay: float = field(0.0, "weight decay", ge=0)
    no_decay: tuple[NonEmpty, ...] = field(
        (),
        "names of parameters that weight decay leaves alone; `*bias` fits every bias, `*norm*` what has norm in its"
        " name (default [])",
    )
    decays: dict[NonEmpty, Annotated[float, Field(ge=0)]] = field(
        {},
        "weight decay of parameters by name, instead of weight_decay; `*attn[12].*` fits those of Stable Diffusion's"
        " attention (default {}); no_decay wins, then the first that fits",
    )
    schedule: Literal["constant", "cosine", "linear"] = field(
        "constant", "course of the learning rate after the warm-up, down to final_lr"
    )
    warmup: int = field(0, "iterations of linear warm-up from 0", ge=0)
    final_lr: float = field(0.0, "learning rate at the end of a cosine or linear schedule", ge=0)
    clip_norm: Positive | None = field(None, "largest norm of the whole gradient")
    clip_value: Positive | None = field(None, "largest absolute value of a gradient's element")

    @field_validator("state")
    @classmethod
    def _of_adam(cls, value: str, info: ValidationInfo) -> str:
        if value == "8bit" and (name := info.data.get("name")) not in ("adam", "adamw"):
            raise ValueError(f"8bit is for adam and adamw, not {name}")
        return value

    @field_validator("final_lr")
    @classmethod
    def _not_above_lr(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("lr", value):
            raise ValueError(f"expected at most lr = {show(info.data['lr'])}, got {show(value)}")
        return value
