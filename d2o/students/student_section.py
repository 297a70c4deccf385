"""`student:` of a recipe, read by the methods that train one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from d2o.settings.section import Positive, Section, field


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
        "network calls of a sample (diffusion2gan and ode): each estimates the image, the next one begins on the way"
        " from there to what the last one was given; trained by the last one's image, with gradients through all",
    )
    levels: list[Positive] | None = field(
        None,
        "noise levels of the calls after the first (default none: of Stable Diffusion's kind evenly in time, 999 and"
        " 499 of 2; else evenly on Karras' scale)",
    )
    init: Literal["teacher", "scratch"] = field(
        "teacher", "start from a copy of the teacher's network, or from random weights"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = field(
        None, "dropout of the student in training (default none: as the teacher's network)"
    )
    freeze: Literal["none", "conv", "conv_qkv", "conv_qkv_skip"] = field(
        "none",
        "layers of its U-Net blocks that keep the weights they start with: none, convolutions, also attention's qkv,"
        " also 1x1 shortcuts",
    )
