"""`student:` of a recipe, read by the methods that train one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from d2o.networks.lora import TARGETS
from d2o.settings.section import Count, NonEmpty, Positive, Section, field
from d2o.settings.wording import show


class LoraSection(Section):
    """The adapters of a student that keeps the teacher's weights."""

    rank: Count = field(..., "columns of B and rows of A")
    alpha: Positive | None = field(None, "B A counts alpha / rank times (default none: alpha is the rank)")
    targets: tuple[NonEmpty, ...] = Field(
        TARGETS,
        min_length=1,
        description="ends of the names of the layers that have one (default [to_q, to_k, to_v, to_out.0]: attention)",
    )


def _of_rank(value: object) -> object:
    """`lora: 16` is short for `lora: {rank: 16}`."""
    if isinstance(value, bool) or (isinstance(value, int) and value < 1):
        raise ValueError(f"expected a rank, an integer of 1 or more, or a section, got {show(value)}")
    if isinstance(value, dict) and isinstance(targets := value.get("targets"), list):
        return {**value, "targets": tuple(targets)}  # what comes through here is no JSON any more
    return LoraSection(rank=value) if isinstance(value, int) else value  # type: ignore[call-arg]


RankedLora = Annotated[LoraSection, BeforeValidator(_of_rank)]


class StudentSection(Section):
    """How the one-step generator starts."""

    sigma: Positive = field(80.0, "noise level at which it is called, in units of the data's [-1, 1] range")
    begins: Literal["noise", "x_T"] = field(
        "noise",
        "what is put in for standard normal z: sigma z, as EDM's samplers begin; or x_T = z as the network sees it, as"
        " those of Stable Diffusion begin (x = sqrt(1 + sigma^2) z; for networks with a discrete schedule)",
    )
    steps: Annotated[int, Field(ge=1, le=1000)] = field(
        1,
        "network calls of a sample (diffusion2gan, gdd and ode): each estimates the image, the next one begins on the"
        " way from there to what the last one was given; trained by the last one's image, with gradients through all",
    )
    levels: list[Positive] | None = field(
        None,
        "noise levels of the calls after the first (default none: of Stable Diffusion's kind evenly in time, 999 and"
        " 499 of 2; else evenly on Karras' scale)",
    )
    init: Literal["teacher", "scratch"] = field(
        "teacher", "start from a copy of the teacher's network, or from random weights"
    )
    lora: RankedLora | None = field(
        None,
        "train low-rank adapters of the teacher's weights instead of all of them: a rank, or a section; for teachers in"
        " diffusers' format, whose weights a checkpoint then names instead of holding them (default none: all weights)",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = field(
        None, "dropout of the student in training (default none: as the teacher's network)"
    )
    freeze: Literal["none", "conv", "conv_qkv", "conv_qkv_skip"] = field(
        "none",
        "layers of its U-Net blocks that keep the weights they start with: none, convolutions, also attention's qkv,"
        " also 1x1 shortcuts",
    )
