"""What a recipe may say: one typed, strict, frozen model per section.

Every field has a description with its unit and default (`describe` lists them). Nothing here reads files: that is `load.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic_core import to_jsonable_python

from d2o.data.known import GET
from d2o.errors import UserError, unknown
from d2o.interop.wording import Problem, Schema, Shape, dotted, phrase, show, tree, word
from d2o.interop.yaml_text import dump

MAX_SEED = 2**32 - 1  # noise takes seeds modulo 2**32; a larger one would silently repeat another's samples
LOADER_KEYS = {
    "extends": "another recipe, by path (relative to this file) or name, that this one changes; one level only",
    "mini": "what `--mini` changes: any of the other keys, merged over them",
}
"""Top-level keys that the loader uses up: they are in files, never in a `Recipe`."""


def _f(default: Any, description: str, **limits: Any) -> Any:
    """A field whose description ends with its default; `...` is a required one."""
    if default is not ... and "(default" not in description:
        shown = json.dumps(default) if not isinstance(default, str) else default or "empty"
        description += f" (default {'none' if default is None else shown})"
    return Field(default, description=description, **limits)


def _exact_integer(value: Any) -> Any:
    if isinstance(value, (bool, float)):  # Literal[1, 3] would take true and 3.0
        raise ValueError(f"expected 1 or 3, got {show(value)}")
    return value


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """The rules of every section: no unknown keys, no silent conversions (an integer may stand for a float), no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Real images."""

    path: Text = _f(..., "folder (class = sub-folder), zip with dataset.json, WebDataset tar, LMDB, npz, CIFAR-10's tar.gz, or `real:digits`")
    get: Text | None = _f(None, f"how to get them, told where they are missing: a text, or {', '.join(GET)}")
    resolution: Count | None = _f(None, "height and width in pixels after resizing and centre-cropping (default none: as they are)")
    channels: Annotated[Literal[1, 3], BeforeValidator(_exact_integer)] | None = _f(None, "1 (grey) or 3 (RGB) (default none: as they are)")
    on_bad: Literal["refuse", "skip"] = _f("refuse", "a corrupt or odd file: stop and name it, or leave it out and name it")
    limit: Count | None = _f(None, "use the first so many images, in order of their names (default none: all)")
    xflip: bool = _f(False, "also use every image mirrored left to right")

    @field_validator("get")
    @classmethod
    def _known_or_text(cls, value: str | None) -> str | None:
        if value is not None and value not in GET and " " not in value:
            raise ValueError(f"expected a text, or one of {', '.join(GET)}, got {show(value)}")
        return value


class Student(Section):
    """How the one-step generator starts."""

    sigma: Positive = _f(80.0, "noise level at which it is called, in units of the data's [-1, 1] range")
    init: Literal["teacher", "scratch"] = _f("teacher", "start from a copy of the teacher's network, or from random weights")
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = _f(None, "dropout of the student in training (default none: as the teacher's network)")


class Pairs(Section):
    """The store of (noise, condition, teacher output); made first if it is missing."""

    path: Text | None = _f(None, "folder of the store (default none: derived from the settings)")
    n: Count = _f(..., "number of pairs")
    solver: Text = _f("heun", "solver of the teacher: heun, euler, ddim, dpmpp or sde")
    steps: Count = _f(18, "solver steps; heun makes 2 * steps - 1 network calls")
    spacing: Literal["leading", "trailing", "linspace"] | None = _f(None, "time steps of SD-like teachers (default none: the teacher's own)")
    final: Literal["scheduler", "x0"] = _f("scheduler", "last step of SD-like teachers: as its scheduler says, or to the predicted image itself")
    eta: float = _f(0.0, "fresh noise in ddim, 0 to 1", ge=0, le=1)
    seed: Seed = _f(0, "seed of the first pair; pair i has seed + i")
    batch: Count = _f(256, "pairs per teacher call")
    shard_size: Count = _f(1024, "pairs per file of the store")
    labels: Text = _f("random", "which classes, as `d2o pairs --labels` takes it")
    cfg: float = _f(1.0, "guidance weight of the teacher; 1 is none", ge=0)
    prompts: Text | None = _f(None, "file of prompts (txt, jsonl, parquet), for teachers that take text")
    per_prompt: Count = _f(1, "pairs in a row that share a prompt")
    rewire: Literal["none", "permute"] = _f("none", "permute: give every noise the output of another one (an experiment that must fail)")
    dtype: Literal["fp32", "fp16", "bf16"] = _f("fp32", "number format of the targets on disk")
    precision: Literal["fp32", "bf16", "fp16"] = _f("fp32", "precision of the teacher's network while pairs are made")
    channels_last: bool = _f(False, "channels-last memory order of the teacher's network while pairs are made")
    store_noise: bool = _f(False, "keep the noise in the store instead of deriving it from the seeds")


class Optim(Section):
    """An optimiser and its learning rate."""

    name: Literal["adam", "adamw", "radam", "sgd"] = _f("adam", "optimiser")
    lr: Positive = _f(..., "learning rate, the highest of the schedule")
    betas: tuple[Beta, Beta] = _f(
        (0.9, 0.999), "decay of the two moments, per iteration; sgd: the first is its momentum (default [0.9, 0.999])"
    )
    eps: Positive = _f(1e-8, "added to the denominator")
    weight_decay: float = _f(0.0, "weight decay", ge=0)
    schedule: Literal["constant", "cosine", "linear"] = _f("constant", "course of the learning rate after the warm-up, down to final_lr")
    warmup: int = _f(0, "iterations of linear warm-up from 0", ge=0)
    final_lr: float = _f(0.0, "learning rate at the end of a cosine or linear schedule", ge=0)
    clip_norm: Positive | None = _f(None, "largest norm of the whole gradient")
    clip_value: Positive | None = _f(None, "largest absolute value of a gradient's element")

    @field_validator("final_lr")
    @classmethod
    def _not_above_lr(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("lr", value):
            raise ValueError(f"expected at most lr = {show(info.data['lr'])}, got {show(value)}")
        return value


class Ema(Section):
    """Moving average of the weights; with neither half_life nor decay there is none."""

    half_life: Positive | None = _f(None, "half-life in images")
    decay: Annotated[float, Field(gt=0, lt=1)] | None = _f(None, "factor per iteration, instead of half_life")
    ramp: Annotated[float, Field(gt=0, le=1)] | None = _f(0.05, "limit of half_life, as a part of the images seen so far; null for none")

    @field_validator("decay")
    @classmethod
    def _one_of_two(cls, value: float | None, info: ValidationInfo) -> float | None:
        half_life = info.data.get("half_life")
        if value is not None and half_life is not None:
            raise ValueError(f"half_life is given too ({show(half_life)}); give one of the two (null takes the other back)")
        return value


class Eval(Section):
    """A metric measured on the way; the best checkpoint is chosen by it."""

    every: Count = _f(..., "images between two measurements")
    metric: Literal["fd", "accuracy"] = _f("fd", "fd: Fréchet distance, lower is better; accuracy: what the method validates by, higher is better")
    extractor: Text | None = _f(None, "feature extractor of the Fréchet distance, by name or path", validate_default=True)
    n: Annotated[int, Field(ge=2)] = _f(1000, "generated samples per measurement")
    reference: Text | None = _f(None, "what to compare with: images or statistics, as `d2o eval --against` takes it", validate_default=True)
    seed: Seed = _f(2_000_000, "seed of the first sample; away from those of the pairs")
    batch: Count = _f(250, "samples per network call")

    @field_validator("extractor", "reference")
    @classmethod
    def _needed_by_fd(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("metric") == "fd":
            raise ValueError("missing; metric fd needs it")
        return value


class Preview(Section):
    """Grids of samples from the same noises every time."""

    every: Count = _f(..., "images between two grids")
    n: Count = _f(64, "samples in a grid")


class Checkpoint(Section):
    """What is kept on the way; the last state is always saved at the end and when the run is stopped."""

    every: Count = _f(50_000, "images between two checkpoints")
    keep: int = _f(3, "number of numbered checkpoints kept; `last` and `best` are extra", ge=0)


class Recipe(Section):
    """One run. `options` holds the method's own section, validated by that method's `Options`."""

    name: str = _f(..., "name of the run and of its product: letters, digits and . _ + -", pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$",
                   json_schema_extra={"words": "a name of letters, digits and . _ + - that begins with a letter or digit"})  # fmt: skip
    title: str = _f("", "one line for people")
    method: Text = _f(..., "training method; its own settings are in a section of that name (`-` written `_`)")
    teacher: Text | None = _f(None, "builtin name, or path of a checkpoint")
    seed: Seed = _f(0, "seed of everything random in training")
    data: Data | None = _f(None, "real images")
    network: dict[str, Any] | None = _f(None, "architecture, for what is trained from scratch: `arch` and that network's arguments")
    student: Student = Field(Student(), description="how the one-step generator starts")
    pairs: Pairs | None = _f(None, "teacher's samples to train on")
    optim: Optim = _f(..., "optimiser")
    optim_critic: Optim | None = _f(None, "second optimiser, of methods with two players (default none: as optim)")
    ema: Ema = Field(Ema(), description="moving average of the weights (default: no average)")
    batch: Count = _f(..., "images per iteration, all processes together")
    micro_batch: Count | None = _f(None, "images per process and forward pass (default none: as large as the share of the batch)")
    images: Count = _f(..., "length of training in images")
    precision: Literal["fp32", "bf16"] = _f("fp32", "fp32, or bf16 autocast")
    channels_last: bool = _f(False, "keep images and weights in channels-last memory order")
    compile: bool = _f(False, "compile the networks (torch.compile)")
    bad_gradients: Literal["raise", "skip", "zero"] = _f(
        "raise", "infinite or undefined gradients: stop, skip the iteration, or zero them; counted"
    )
    threads: Count | None = _f(None, "CPU threads of torch (default none: torch's choice)")
    log_every: Count = _f(20, "iterations between two lines of metrics.jsonl")
    eval: Eval | None = _f(None, "metric measured on the way")
    preview: Preview | None = _f(None, "grids of samples on the way")
    checkpoint: Checkpoint = Field(Checkpoint(), description="what is kept on the way")
    reproduces: dict[str, Any] | None = _f(None, "the published number this aims at: paper, table, row, value, ...")
    _options: Any = PrivateAttr(None)

    @field_validator("micro_batch")
    @classmethod
    def _part_of_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value > info.data.get("batch", value):
            raise ValueError(f"expected at most batch = {info.data['batch']}, got {value}")
        return value

    @property
    def options(self) -> Any:
        """The method's own settings, an instance of its `Options`. None only for a Recipe built without `from_dict`."""
        return self._options

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """From what `resolved` gives, e.g. in a checkpoint's metadata. UserError: one line per problem, `where` in front."""
        recipe, problems = check(data)
        if recipe is None:
            raise UserError("\n".join(f"{where}: {dotted(p.path)}: {p.text}" for p in problems))
        return recipe

    def resolved(self) -> dict[str, Any]:
        """All settings, defaults included, as plain data in a fixed order: a recipe without `extends` and `mini` that gives this one."""
        data = self.model_dump()
        if self._options is not None:
            data[section_key(self.method)] = self._options.model_dump()
        return to_jsonable_python(data, inf_nan_mode="constants")

    def to_yaml(self) -> str:
        """`resolved()` as the text of a recipe file; `load_recipe` reads it back to an equal Recipe."""
        return dump(self.resolved())


def section_key(method: str) -> str:
    """The key of a method's own section: `spi-gan` -> `spi_gan`."""
    return method.replace("-", "_")


def check(data: Mapping[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The Recipe that plain data (no `extends`, no `mini`) stands for, or None and everything that is wrong with it."""
    from d2o.methods.base import get_method, method_names

    rest, method, names = dict(data), data.get("method"), method_names()
    sections = {section_key(name): name for name in names}
    problems: list[Problem] = []
    own: Any = None
    known = isinstance(method, str) and method in names
    if known:
        own = rest.pop(section_key(str(method)), {})
    elif isinstance(method, str) and method:
        error = unknown("method", method, names)
        problems.append(Problem(("method",), f"{error.message} ({error.hint})"))
        rest.pop(section_key(method), None)
    for key in [key for key in rest if key in sections and key not in Recipe.model_fields]:
        value = rest.pop(key)
        if known and value is not None:  # null takes away the section of another method, from a recipe that is extended
            problems.append(Problem((key,), f"unknown key: it belongs to method {sections[key]!r}, but this recipe's method is {method!r}"))

    shape = shape_of(method)
    recipe, options = None, None
    try:  # JSON mode: strict, but lists may stand for tuples
        recipe = Recipe.model_validate_json(json.dumps(rest))
    except ValidationError as error:
        problems += word(error, rest, (), shape)
    if known:
        try:
            options = get_method(str(method)).Options.model_validate_json(json.dumps({} if own is None else own), strict=True)
        except ValidationError as error:
            problems += word(error, own, (section_key(str(method)),), shape)
    if recipe is None or problems:
        return None, problems
    recipe._options = options
    return recipe, []


def shape_of(method: Any = None) -> Shape:
    """What a recipe of that method may hold; without the method's own section when there is no such method."""
    from d2o.methods.base import get_method, method_names

    whole = _recipe_tree()
    if isinstance(method, str) and method in method_names():
        own = {**tree(get_method(method).Options), "description": f"settings of method {method}"}
        whole = {**whole, "properties": {**whole["properties"], section_key(method): own}}
    return Shape(whole, list(LOADER_KEYS))


@functools.cache
def _recipe_tree() -> Schema:
    return tree(Recipe)


class Row(NamedTuple):
    """One key of a recipe, for printing."""

    key: str
    expected: str
    description: str


def describe(method: str | None = None) -> list[Row]:
    """Every key that a recipe may have, in order; with a method, those of its own section too."""
    shape = shape_of(method)
    rows = [(path, shape.at(path) or {}) for path in shape.paths()]
    loader = [Row("extends", "a text", LOADER_KEYS["extends"]), Row("mini", "a section", LOADER_KEYS["mini"])]
    return [Row(dotted(path), phrase(schema), schema.get("description", "")) for path, schema in rows] + loader
