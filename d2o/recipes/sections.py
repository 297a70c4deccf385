"""The sections of a recipe: typed, strict, frozen models. Every field has a description with its unit and default."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from d2o.data.known import GET
from d2o.errors import UserError
from d2o.settings.wording import show

if TYPE_CHECKING:
    from d2o.evaluation.presets import Preset

MAX_SEED = 2**32 - 1  # noise takes seeds modulo 2**32; a larger one would silently repeat another's samples


def field(default: Any, description: str, **limits: Any) -> Any:
    """A field whose description ends with its default; `...` is a required one."""
    if default is not ... and "(default" not in description:
        shown = json.dumps(default) if not isinstance(default, str) else default or "empty"
        description += f" (default {'none' if default is None else shown})"
    return Field(default, description=description, **limits)


def _exact_integer(value: Any) -> Any:
    if isinstance(value, (bool, float)):  # Literal[1, 3] would take true and 3.0
        raise ValueError(f"expected 1 or 3, got {show(value)}")
    return value


def _at_most(most: int) -> AfterValidator:
    """A limit that no real setting comes near: said only to those who exceed it."""

    def check(value: int) -> int:
        if value > most:
            raise ValueError(f"expected at most {most}, got {show(value)}")
        return value

    return AfterValidator(check)


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]  # below 2**63, as every integer of a recipe
Batch = Annotated[Count, _at_most(2**20)]
Steps = Annotated[Count, _at_most(100_000)]
Threads = Annotated[Count, _at_most(1024)]
Resolution = Annotated[Count, _at_most(2**13)]
Pictures = Annotated[Count, _at_most(4096)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """The rules of every section: no unknown keys, no silent conversions (an integer may stand for a float), no changes
    afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Real images."""

    path: Text = field(
        ...,
        "folder (class = sub-folder), zip with dataset.json, WebDataset tar, LMDB, npz, CIFAR-10's tar.gz, or"
        " `real:digits`",
    )
    licence: Text | None = field(
        None,
        "under which terms the images are had, recorded in everything trained on them; it is that of `path` and goes "
        "with it: another path has another (default none: not stated)",
    )
    get: Text | None = field(None, f"how to get them, told where they are missing: a text, or {', '.join(GET)}")
    resolution: Resolution | None = field(
        None, "height and width in pixels after resizing and centre-cropping (default none: as they are)"
    )
    channels: Annotated[Literal[1, 3], BeforeValidator(_exact_integer)] | None = field(
        None, "1 (grey) or 3 (RGB) (default none: as they are)"
    )
    on_bad: Literal["refuse", "skip"] = field(
        "refuse", "a corrupt or odd file: stop and name it, or leave it out and name it"
    )
    limit: Count | None = field(None, "use the first so many images, in order of their names (default none: all)")
    xflip: bool = field(False, "also use every image mirrored left to right")

    @field_validator("get")
    @classmethod
    def _known_or_text(cls, value: str | None) -> str | None:
        if value is not None and value not in GET and " " not in value:
            raise ValueError(f"expected a text, or one of {', '.join(GET)}, got {show(value)}")
        return value


class StudentSection(Section):
    """How the one-step generator starts."""

    sigma: Positive = field(80.0, "noise level at which it is called, in units of the data's [-1, 1] range")
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


class Pairs(Section):
    """The store of (noise, condition, teacher output); made first if it is missing. Keys that are left away are as the
    store at `path` says."""

    path: Text | None = field(None, "folder of the store (default none: derived from the settings)")
    n: Count = field(
        ...,
        "number of pairs: a store with fewer grows, of one with more the first are taken; all, if `path` is a store",
    )
    solver: Text = field("heun", "solver of the teacher: heun, euler, ddim, dpmpp or sde")
    steps: Steps = field(18, "solver steps; heun makes 2 * steps - 1 network calls")
    spacing: Literal["leading", "trailing", "linspace"] | None = field(
        None, "time steps of SD-like teachers (default none: the teacher's own)"
    )
    final: Literal["scheduler", "x0"] = field(
        "scheduler", "last step of SD-like teachers: as its scheduler says, or to the predicted image itself"
    )
    eta: float = field(0.0, "fresh noise in ddim, 0 to 1", ge=0, le=1)
    seed: Seed = field(0, "seed of the first pair; pair i has seed + i")
    batch: Batch = field(256, "pairs per teacher call")
    shard_size: Batch = field(1024, "pairs per file of the store")
    labels: Text = field("random", "which classes, as `d2o pairs --labels` takes it")
    cfg: float = field(1.0, "guidance weight of the teacher; 1 is none", ge=0)
    prompts: Text | None = field(None, "file of prompts (txt, jsonl, parquet), for teachers that take text")
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


class Optim(Section):
    """An optimiser and its learning rate."""

    name: Literal["adam", "adamw", "radam", "sgd"] = field("adam", "optimiser")
    lr: Positive = field(..., "learning rate, the highest of the schedule")
    betas: tuple[Beta, Beta] = field(
        (0.9, 0.999), "decay of the two moments, per iteration; sgd: the first is its momentum (default [0.9, 0.999])"
    )
    eps: Positive = field(1e-8, "added to the denominator")
    weight_decay: float = field(0.0, "weight decay", ge=0)
    no_decay: tuple[Text, ...] = field(
        (),
        "names of parameters that weight decay leaves alone; `*bias` fits every bias, `*norm*` what has norm in its"
        " name (default [])",
    )
    schedule: Literal["constant", "cosine", "linear"] = field(
        "constant", "course of the learning rate after the warm-up, down to final_lr"
    )
    warmup: int = field(0, "iterations of linear warm-up from 0", ge=0)
    final_lr: float = field(0.0, "learning rate at the end of a cosine or linear schedule", ge=0)
    clip_norm: Positive | None = field(None, "largest norm of the whole gradient")
    clip_value: Positive | None = field(None, "largest absolute value of a gradient's element")

    @field_validator("final_lr")
    @classmethod
    def _not_above_lr(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("lr", value):
            raise ValueError(f"expected at most lr = {show(info.data['lr'])}, got {show(value)}")
        return value


class Ema(Section):
    """Moving average of the weights; with neither half_life nor decay there is none."""

    half_life: Positive | None = field(None, "half-life in images")
    decay: Annotated[float, Field(gt=0, lt=1)] | None = field(None, "factor per iteration, instead of half_life")
    ramp: Annotated[float, Field(gt=0, le=1)] | None = field(
        0.05, "limit of half_life, as a part of the images seen so far; null for none"
    )
    start: int = field(0, "images before it begins; until then it is the weights themselves", ge=0)

    @field_validator("decay")
    @classmethod
    def _one_of_two(cls, value: float | None, info: ValidationInfo) -> float | None:
        half_life = info.data.get("half_life")
        if value is not None and half_life is not None:
            raise ValueError(
                f"half_life is given too ({show(half_life)}); give one of the two (null takes the other back)"
            )
        return value


class Eval(Section):
    """A metric measured on the way; the best checkpoint is chosen by it."""

    every: Count = field(..., "images between two measurements")
    metric: Literal["fd", "accuracy"] = field(
        "fd", "fd: Fréchet distance, lower is better; accuracy: what the method validates by, higher is better"
    )
    protocol: Text | None = field(
        None,
        "a protocol of `d2o eval --protocol`; extractor, n and reference are its own, the seeds are not: what a "
        "checkpoint is chosen by is not what it is reported on",
    )
    extractor: Text | None = field(
        None,
        "feature extractor of the Fréchet distance, by name or path (default none: the protocol's)",
        validate_default=True,
    )
    n: Annotated[int, Field(ge=2)] | None = field(
        None, "generated samples per measurement (default none: the protocol's, else 1000)", validate_default=True
    )
    reference: Text | None = field(
        None,
        "what to compare with: `data`, the recipe's own images as training reads them, or images or "
        "statistics, as `d2o eval --against` takes it (default none: the protocol's)",
        validate_default=True,
    )
    seed: Seed = field(2_000_000, "seed of the first sample; away from those of the pairs")
    batch: Batch = field(250, "samples per network call")

    @field_validator("protocol")
    @classmethod
    def _has_a_distance(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        preset = _preset(value)
        if info.data.get("metric") != "fd":
            raise ValueError(f"metric {info.data.get('metric')} has no protocol")
        if not preset.frechet or "prompts" in preset.needs:
            why = "needs prompts" if preset.frechet else f"measures {', '.join(preset.metrics)} and no Fréchet distance"
            raise ValueError(f"{value} {why}: it cannot be measured on the way")
        return value

    @field_validator("extractor", "n", "reference")
    @classmethod
    def _as_the_protocol(cls, value: Any, info: ValidationInfo) -> Any:
        """What the protocol says, or 1000 samples; a distance without a network or a reference is refused."""
        key = str(info.field_name)
        if not {"metric", "protocol"} <= info.data.keys():  # they are wrong themselves
            return value
        name = info.data["protocol"]
        if name is None:
            if value is None and key != "n" and info.data["metric"] == "fd":
                raise ValueError("missing; metric fd needs it")
            return 1000 if value is None and key == "n" else value
        preset = _preset(name)
        allowed = {
            "extractor": preset.frechet,
            "n": [preset.settings["n"]],
            "reference": [preset.reference] if preset.reference else [],
        }[key]
        if value is None and not allowed:
            raise ValueError(
                f"missing; protocol {name} is measured against {preset.needs['against']}, which you have to name"
            )
        if value is not None and allowed and value not in allowed:
            raise ValueError(
                f"expected {' or '.join(map(show, allowed))} as protocol {name} has it, or nothing, got {show(value)}"
            )
        return allowed[0] if value is None else value


def _preset(name: str) -> Preset:
    from d2o.evaluation.paper_protocols import find_preset

    try:
        return find_preset(name)
    except UserError as error:
        raise ValueError(f"{error.message} ({error.hint})") from error


class Tracker(Section):
    """Where the log goes besides metrics.jsonl and TensorBoard."""

    name: Literal["wandb", "mlflow"] = field(
        ..., "Weights & Biases (pip install 'd2o[wandb]') or MLflow (pip install 'd2o[mlflow]')"
    )
    project: Text = field("d2o", "project of wandb, experiment of MLflow")
    run: Text | None = field(None, "name of the run there (default none: the recipe's)")
    uri: Text | None = field(
        None, "server; of MLflow also sqlite:///FILE.db (default none: what the package's own settings say)"
    )


def _named(value: Any) -> Any:
    """`tracker: wandb` is short for `tracker: {name: wandb}`."""
    if isinstance(value, str) and value not in ("wandb", "mlflow"):
        raise ValueError(f"expected 'wandb', 'mlflow' or a section, got {show(value)}")
    return Tracker(name=value) if isinstance(value, str) else value  # type: ignore[arg-type]


TrackerSection = Annotated[Tracker, BeforeValidator(_named)]


class PreviewSection(Section):
    """Grids of samples from the same noises every time."""

    every: Count = field(..., "images between two grids")
    n: Pictures = field(64, "samples in a grid")


class Checkpoint(Section):
    """What is kept on the way; the last state is always saved at the end and when the run is stopped."""

    every: Count = field(50_000, "images between two checkpoints")
    keep: int = field(3, "number of numbered checkpoints kept; `last` and `best` are extra", ge=0)
