"""`pairs:` of a recipe, of which `training.setup` makes a store's `PairSettings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from d2o.settings.section import BatchSize, Count, NonEmpty, Section, Seed, Steps, field

Scale = Annotated[float, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]


class PairsSection(Section):
    """The store of (noise, condition, teacher output); made first if it is missing. Keys that are left away are as the
    store at `path` says."""

    path: NonEmpty | None = field(None, "folder of the store (default none: derived from the settings)")
    n: Count = field(
        ...,
        "number of pairs: a store with fewer grows, of one with more the first are taken; all, if `path` is a store",
    )
    solver: NonEmpty = field("heun", "solver of the teacher: heun, euler, ddim, dpmpp or sde")
    steps: Steps = field(18, "solver steps; heun makes 2 * steps - 1 network calls")
    spacing: Literal["leading", "trailing", "linspace"] | None = field(
        None, "time steps of SD-like teachers (default none: the teacher's own)"
    )
    final: Literal["scheduler", "x0"] = field(
        "scheduler", "last step of SD-like teachers: as its scheduler says, or to the predicted image itself"
    )
    eta: float = field(0.0, "fresh noise in ddim, 0 to 1", ge=0, le=1)
    s_churn: NotNegative = field(40.0, "solver sde: fresh noise of all steps together")
    s_min: NotNegative = field(0.05, "solver sde: lowest sigma at which noise is added")
    s_max: NotNegative = field(50.0, "solver sde: highest sigma at which noise is added")
    s_noise: NotNegative = field(1.003, "solver sde: standard deviation of the added noise")
    seed: Seed = field(0, "seed of the first pair; pair i has seed + i")
    batch: BatchSize = field(256, "pairs per teacher call")
    shard_size: BatchSize = field(1024, "pairs per file of the store")
    labels: NonEmpty = field("random", "which classes, as `d2o pairs --labels` takes it")
    cfg: Scale | tuple[Scale, Scale] = field(
        1.0,
        "guidance weight of the teacher; 1 is none. [1, 8]: each pair has its own, uniform of that range, and the"
        " student is told it",
    )
    sdxl_uncond: Literal["zeros", "encode_empty"] | None = field(
        None,
        "what guidance of Stable Diffusion XL takes for no prompt: all-zero text, or the empty prompt encoded (default"
        " none: as the teacher's model_index.json says; the published XL: zeros)",
    )
    prompts: NonEmpty | None = field(None, "file of prompts (txt, jsonl, parquet), for teachers that take text")
    per_prompt: Count = field(1, "pairs in a row that share a prompt")
    rewire: Literal["none", "permute"] = field(
        "none", "permute: give every noise the output of another one (an experiment that must fail)"
    )
    dtype: Literal["fp32", "fp16", "bf16"] = field("fp32", "number format of the targets on disk")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = field(
        "fp32",
        "precision of the teacher's network while pairs are made; auto: bf16 where the processor computes in it,"
        " recorded in the store",
    )
    channels_last: bool | Literal["auto"] = field(
        "auto",
        "channels-last memory order of the teacher's network while pairs are made; auto: where that is faster, recorded"
        " in the store",
    )
    store_noise: bool = field(False, "keep the noise in the store instead of deriving it from the seeds")

    @field_validator("cfg")
    @classmethod
    def _is_a_range(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        if isinstance(value, tuple) and value[0] >= value[1]:
            raise ValueError(f"expected a number, or a range like [1, 8], got {list(value)}")
        return value
