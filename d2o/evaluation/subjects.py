"""What can be evaluated, or compared with (generators, sets of images, statistics), found from what the user typed."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from d2o.condition import Asked, Condition, Generate
from d2o.data.images import ImageSet, open_images
from d2o.data.prompt_files import open_prompts
from d2o.data.prompts import Prompts
from d2o.errors import UserError, nearest
from d2o.evaluation.extractor import Device, Extractor, check_images_fit
from d2o.evaluation.prepare import parse_preparation, quantize
from d2o.evaluation.protocol import Settings
from d2o.evaluation.statistics import Statistics
from d2o.evaluation.statistics_files import is_statistics, load_statistics
from d2o.inputs import JsonObject, check_input, read_json
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import file_sha256, read_meta, resolve_checkpoint
from d2o.networks.build import count_parameters
from d2o.networks.processor import arrange
from d2o.spaces.base import UNNAMED
from d2o.spaces.load import load_space
from d2o.students.base import load_student
from d2o.students.consistency import ConsistencyStudent
from d2o.teachers.base import GUIDED_BY, Spec, guided_name
from d2o.teachers.registry import BUILTIN, load_teacher, teacher_names


@dataclass
class Generator:
    """A student or a teacher. `sample` gives its diffusion space, `decode` makes images in [-1, 1] of that; `embed`
    makes of prompts what `sample` would make of them anyway (to be timed on its own). `record`: what a result says of
    it (nfe, forwards, parameters, ...).
    `recipe`: of its training, where it is known."""

    name: str
    source: str
    kind: str  # "student" or "teacher"
    spec: Spec
    sample: Generate
    decode: Callable[[Tensor], Tensor]
    teacher: str | None  # whose distillate, or which, it is
    record: JsonObject
    notes: list[str] = field(default_factory=list)
    prompts: Prompts | None = None
    embed: Callable[[Condition], Asked] | None = None
    recipe: JsonObject = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """Images [b, C, H, W] in [-1, 1]."""
        return self.decode(self.sample(noise, condition))


@dataclass
class Pictures:
    """A set of images. `batch(indices)` -> (uint8 [k, C, H, W], class indices [k] or None).

    `classes`: how many the labels are of; None where they are plain class numbers, of which the set may hold a few.
    """

    name: str
    source: str
    kind: str  # "images" or "pairs"
    shape: tuple[int, ...]
    n: int
    batch: Callable[[Sequence[int]], tuple[Tensor, Tensor | None]]
    labelled: bool
    classes: int | None
    record: JsonObject
    teacher: str | None = None
    resize: str = "none"
    notes: list[str] = field(default_factory=list)
    captions: Callable[[Sequence[int]], list[str]] | None = None  # the prompts they were made from
    duplicates: Callable[[], int] = lambda: 0  # how many are copies of another, of those that were read


@dataclass
class Numbers:
    """Statistics without images; `read` gives those of an extractor, for files that hold several."""

    name: str
    source: str
    read: Callable[[str | None], Statistics]
    kind: str = "statistics"
    teacher: str | None = None
    record: JsonObject = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def statistics(self) -> Statistics:
        return self.read(None)


Subject = Generator | Pictures | Numbers


def check_there(text: str, others: Collection[str] = ()) -> None:
    """UserError, at once, where `open_subject` would find nothing of that name, or nothing that can be opened.
    `others`: names that could be meant as well."""
    text = text.partition(GUIDED_BY)[0]
    there = os.path.exists(text)
    if there and not os.path.isdir(text):
        check_input(text, "images, a checkpoint or statistics")
    if not (
        there or text.startswith("real:") or text in teacher_names() or any(mark in Path(text).name for mark in "*{")
    ):
        raise _absent(text, others)


def _absent(text: str, others: Collection[str] = ()) -> UserError:
    near = nearest(text, [*teacher_names(), "real:digits", *others])
    return UserError(
        f"no such file or teacher: {text!r}" + (f"; did you mean {near!r}?" if near else ""),
        "give a checkpoint, a run, images (folder, zip, tar, npz), a pair store, statistics (.npz), real:digits, or a"
        f" teacher: {', '.join(teacher_names())}",
    )


def open_subject(
    text: str, settings: Settings, device: Device = "cpu", extractor: Extractor | None = None, on_bad: str = "refuse"
) -> Subject:
    """Find what `text` means: builtin teacher, real:..., checkpoint, run folder, pair store, statistics (.npz with mu
    and sigma), images.

    `extractor` is needed for --resize crop alone: it gives the size. UserError: nothing of that name, or a damaged or
    foreign file.
    """
    check_there(text)
    path = Path(text)
    if GUIDED_BY in text:
        return _teacher(text, text, None, settings, device)
    if text.startswith("real:"):
        return _pictures(text, settings, extractor, on_bad)
    if text in teacher_names() and not path.exists():
        return _teacher(text, text, asset(BUILTIN[text]) if text in BUILTIN else None, settings, device)
    if any(mark in path.name for mark in "*{"):  # shards of a tar, as open_images takes them
        return _pictures(text, settings, extractor, on_bad)
    if (path.suffix == ".pkl" and not is_statistics(path)) or (path / "model_index.json").is_file():
        return _teacher(text, path.stem, path, settings, device)
    if path.is_dir() and (path / "checkpoints").is_dir():
        return _checkpoint(text, resolve_checkpoint(path), settings, device)
    if (path / "recipe.yaml").is_file() and (path / "metrics.jsonl").is_file():
        raise UserError(
            f"{path} is a run without a checkpoint",
            "its training has saved none yet: go on with `d2o train ... --resume`",
        )
    if path.is_dir() and _is_pair_store(path):
        return _pairs(text, settings, device)
    if path.suffix == ".safetensors":
        return _checkpoint(text, path, settings, device)
    if path.suffix in (".npz", ".npy", ".pkl", ".pt") and is_statistics(path):
        return Numbers(text, text, lambda name: load_statistics(path, name))
    return _pictures(text, settings, extractor, on_bad)


def _teacher(text: str, label: str, path: Path | None, settings: Settings, device: Device) -> Generator:
    model = load_teacher(guided_name(text, None if GUIDED_BY in text else settings.guide), device)
    if model.guide is not None and settings.cfg in (None, 1):
        raise UserError(f"{model.guide.spec.name!r} guides nothing at a scale of 1", "give --cfg, for example 1.4")
    ordered = arrange(model.network, device)
    if model.guide is not None:
        arrange(model.guide.network, device)
    solver = model.solver(settings.solver, settings.steps)
    solver.grid(model.schedule)  # whether it fits
    if solver.stochastic:
        raise UserError(f"`d2o eval` samples deterministically; {solver.name} is not", "take another --solver")
    cfg = 1.0 if settings.cfg is None else settings.cfg
    model.check_cfg(cfg)
    prompts = prompts_for(settings, model.spec)
    file = path if model.guide is None and path is not None and path.is_file() else None
    record = {
        "sha256": model.fingerprint if file is None else file_sha256(file),
        "fingerprint": model.fingerprint,
        "parameters": count_parameters(model.network),
        "nfe": solver.nfe,
        "forwards": solver.forwards(cfg),
        "solver": solver.name,
        "steps": solver.steps,
        "cfg": cfg,
        "licence": model.spec.licence,
        **({"channels_last": True} if ordered else {}),
        **({} if model.guide is None else {"guide": model.guide.record}),
    }

    def sample(noise: Tensor, condition: Condition) -> Tensor:
        return model.sample(noise, condition, solver, cfg=cfg)

    name = f"{label}, {solver.name} {solver.steps}" + (f", cfg {cfg:g}" if cfg != 1 else "")
    return Generator(
        name,
        text,
        "teacher",
        model.spec,
        sample,
        torch.inference_mode()(model.decode),
        text if text in BUILTIN else model.spec.name,
        record,
        prompts=prompts,
        embed=model.embed if prompts else None,
    )


def prompts_for(settings: Settings, spec: Spec) -> Prompts | None:
    """The prompts of a generator that takes text; None of another (a reference by class may stand beside). UserError:
    none are given for it."""
    if spec.condition != "text":
        return None
    if settings.prompts is None:
        hint = 'give --prompt "...", or --prompts FILE (.txt, .jsonl or .parquet)'
        raise UserError(f"{spec.name!r} is conditioned on text", hint)
    if isinstance(settings.prompts, str):
        return open_prompts(settings.prompts)
    return Prompts.from_list(settings.prompts)


def _checkpoint(text: str, path: Path, settings: Settings, device: Device) -> Generator:
    kind = read_meta(path).get("kind")
    label = path.parent.parent.name or path.stem if path.parent.name == "checkpoints" else path.stem
    if kind == "teacher":
        return _teacher(str(path), label, path, settings, device)
    if kind != "student":
        raise UserError(f"{path} holds {kind or 'something foreign'}, not a student or a teacher")
    model = load_student(path, device)
    if (
        isinstance(model, ConsistencyStudent) and settings.steps is not None
    ):  # of others --steps is not: it may be for a teacher among the X
        model = model.with_steps(settings.steps)
        label += f", {settings.steps} steps" if settings.steps > 1 else ""
    # --cfg is for the teachers among the X, and what a student is measured against, if it is not told it.
    cfg = None if model.guidance is None else model.check_cfg(settings.cfg)
    label += "" if cfg is None else f", cfg {cfg:g}"
    ordered = arrange(model.network, device)

    @torch.inference_mode()
    def sample(noise: Tensor, condition: Condition) -> Tensor:
        return model(noise.to(device), condition.guided(cfg))

    made_from = model.meta.get("teacher") or {}
    record = {
        "sha256": file_sha256(path),
        "parameters": count_parameters(model),
        "nfe": model.nfe,
        "forwards": model.nfe,
        **({"steps": model.nfe} if isinstance(model, ConsistencyStudent) else {}),
        **({} if cfg is None else {"cfg": cfg}),
        "recipe": (model.meta.get("recipe") or {}).get("name"),
        "teacher": made_from.get("name"),
        "teacher_sha256": made_from.get("sha256"),
        "licence": model.spec.licence,
        **({"channels_last": True} if ordered else {}),
    }
    return Generator(
        label,
        text,
        "student",
        model.spec,
        sample,
        torch.inference_mode()(model.decode),
        made_from.get("name"),
        record,
        prompts=prompts_for(settings, model.spec),
        embed=model.embed if model.spec.condition == "text" else None,
        recipe=model.meta.get("recipe") or {},
    )


def _is_pair_store(folder: Path) -> bool:
    try:
        record = read_json(folder / "manifest.json")
    except UserError:
        return False
    return isinstance(record, dict) and record.get("format") == "d2o-pairs"


def _pairs(text: str, settings: Settings, device: Device) -> Pictures:
    from d2o.data.pairs import PairStore

    store, preparation = PairStore(text), settings.preparation
    teacher: str = store.manifest["teacher"]["name"]
    decode = _decoder(teacher, Spec.from_dict(store.spec, text), device)

    def batch(indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        _, condition, target = store.batch(indices)
        return preparation.apply(quantize(decode(target), settings.quantize)), condition.labels

    images, labels = batch([0])
    return Pictures(
        text,
        text,
        "pairs",
        tuple(images.shape[1:]),
        len(store),
        batch,
        labels is not None,
        None,
        {"fingerprint": store.fingerprint},
        teacher,
        preparation.describe(),
        captions=store.prompts if store.has_prompts else None,
    )


def _decoder(teacher: str, spec: Spec, device: Device) -> Callable[[Tensor], Tensor]:
    """How a pair store's targets become images. Only stores of older versions need their teacher for it."""
    if not spec.latent:
        return lambda x: x.clamp(*spec.value_range)
    if spec.space == UNNAMED:
        return load_teacher(teacher, device).decode
    return load_space(spec.space, device).decode


def _pictures(text: str, settings: Settings, extractor: Extractor | None, on_bad: str) -> Pictures:
    preparation = parse_preparation(settings.resize).sized(extractor.shape if extractor else None)
    try:
        found = open_images(text, **preparation.reading(), on_bad=on_bad)
    except UserError as error:
        hint = (
            "--resize 256 (or another size) cuts out the centre square and resizes it"
            if "differ in size" in error.message
            else error.hint
        )
        raise UserError(error.message, hint) from error
    return pictures(found, text, preparation.describe())


def pictures(found: ImageSet, text: str, resize: str = "none") -> Pictures:
    """A set of images that is open; `text`: how it was named."""
    notes = [f"{text}: {note}" for note in [*found.notes, *(f"skipped {name}: {why}" for name, why in found.bad)]]
    # Where classes are called 0, 3, 7 these are the labels, so that a set of some of the classes still means what it
    # says.
    numbered = all(name.isdecimal() and str(int(name)) == name for name in found.class_names)
    labels = found.labels
    if labels is not None and numbered:
        labels = torch.tensor([int(name) for name in found.class_names])[labels]

    def batch(indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return found.images(indices), None if labels is None else labels[torch.as_tensor(indices)]

    return Pictures(
        text,
        text,
        "images",
        found.shape,
        len(found),
        batch,
        labels is not None,
        None if numbered else found.classes,
        {"fingerprint": found.fingerprint},
        resize=resize,
        duplicates=lambda: found.duplicates,
        notes=notes,
    )


def image_shape(subject: Subject) -> tuple[int, ...] | None:
    """(C, H, W) of the images; None for statistics."""
    return None if isinstance(subject, Numbers) else tuple(subject.shape)


def check_subject(subject: Subject, extractor: Extractor) -> None:
    """UserError unless the extractor can take the subject's images."""
    if isinstance(subject, Generator) and subject.spec.latent:
        return  # decoded images have another size; the extractor checks them
    shape = image_shape(subject)
    if shape is not None:
        check_images_fit(shape, extractor, of=f"the images of {subject.source}")
