"""What is exported: a checkpoint as one callable module with named inputs, and example inputs to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.condition import Text
from d2o.diffusion.guidance import Range
from d2o.diffusion.noise import noise_and_labels
from d2o.errors import UserError
from d2o.export.any_batch import for_any_batch
from d2o.inputs import JsonObject
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import file_sha256, read_meta, resolve_checkpoint
from d2o.networks.build import network_config
from d2o.networks.lora import merged
from d2o.students.base import Student, checkpoint_meta, load_student
from d2o.students.consistency import ConsistencyStudent
from d2o.students.multistep import MultistepStudent
from d2o.students.style import StyleStudent
from d2o.teachers.base import UNSTATED, Spec
from d2o.teachers.registry import BUILTIN, load_teacher

PROMPTS = ("a photo of a dog", "")
"""Any text is a prompt; what a student makes of it must not change."""


class StudentCall(nn.Module):
    """forward(noise [N, C, H, W], label [N] int64 if conditional, guidance [N] float32 if it is told that) -> image
    [N, C, H, W] float32: the student as it is, unclipped."""

    names: tuple[str, ...] = ()

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, noise: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None:
            return self.student.call(noise, label, guidance)
        return self.student(noise, label)


class NamedCall(StudentCall):
    """As StudentCall, with inputs by the order of `names`: of text students `states` [N, L, D] (and `pooled` [N, P])
    take the label's place; of those who draw noise on the way `latents` [N, K, nz] and `step_noise` [N, steps, C, H, W]
    stand for it."""

    def __init__(self, student: Student, names: tuple[str, ...]):
        super().__init__(student)
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        given = dict(zip(self.names, inputs))
        asked = Text(given["states"], given.get("pooled")) if "states" in given else given.get("label")
        if "guidance" in given:
            return self.student.call(given["noise"], asked, given["guidance"])
        if "latents" not in given and "step_noise" not in given:
            return self.student(given["noise"], asked)
        drawn = {name: iter(given[name].unbind(1)) for name in ("latents", "step_noise") if name in given}

        def randn(*shape: int) -> Tensor:
            return next(drawn["latents" if len(shape) == 1 else "step_noise"])

        return self.student(given["noise"], asked, randn)  # type: ignore[call-arg]


class DenoiserCall(nn.Module):
    """forward(noisy [N, C, H, W], sigma [N] > 0, label [N] int64 if conditional) -> denoised [N, C, H, W] float32: D(x;
    sigma)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return self.network(noisy, sigma, label)


def stated(value: object) -> str | None:
    """The licence or name that a record states, None where it states none."""
    return None if value in (None, "", "unstated", UNSTATED) else str(value)


@dataclass
class Loaded:
    """A loaded checkpoint. `kind` "student" or "teacher"; `network` holds the file's weights; `call(*inputs)` is what
    is exported."""

    path: Path
    kind: str
    spec: Spec
    meta: JsonObject
    network: nn.Module
    fingerprint: str
    call: nn.Module

    @property
    def student(self) -> Student:
        """The student itself. UserError: it is a teacher."""
        if not isinstance(self.call, StudentCall):
            raise UserError(f"{self.path} is a teacher", "students are expected here")
        return self.call.student

    @property
    def inputs(self) -> tuple[str, ...]:
        if isinstance(self.call, StudentCall) and self.call.names:
            return self.call.names
        first = ("noise",) if self.kind == "student" else ("noisy", "sigma")
        last = () if self.guidance is None else ("guidance",)
        return (*first, *(() if self.spec.condition == "none" else ("label",)), *last)

    @property
    def guidance(self) -> Range | None:
        """The guidance scales that a student may be told; None: none, or a teacher."""
        return self.call.student.guidance if isinstance(self.call, StudentCall) else None

    @property
    def output(self) -> str:
        return "image" if self.kind == "student" else "denoised"

    @property
    def licence(self) -> str:
        """The teacher's licence as the checkpoint states it, or "not stated"."""
        of_teacher = self.made_from.get("licence") if self.kind == "student" else None
        return stated(of_teacher) or stated(self.spec.licence) or UNSTATED

    @property
    def teacher(self) -> str:
        """The teacher's name as the checkpoint states it (its own for a teacher), or "not stated"."""
        if self.kind == "teacher":
            return self.spec.name
        return stated(self.made_from.get("name")) or UNSTATED

    @property
    def made_from(self) -> JsonObject:
        """The checkpoint's record of its teacher (name, sha256, licence); empty when there is none."""
        record = self.meta.get("teacher")
        return record if isinstance(record, dict) else {}

    @property
    def drawn(self) -> dict[str, tuple[int, ...]]:
        """What a student draws on its way for itself: name -> shape for a sample."""
        student = self.call.student if isinstance(self.call, StudentCall) else None
        shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(student, MultistepStudent):
            shapes["latents"] = (student.nfe, student.nz)
        if isinstance(student, MultistepStudent) or (isinstance(student, ConsistencyStudent) and student.form == "cd"):
            shapes["step_noise"] = (student.nfe - 1, *self.spec.shape)
        return {name: shape for name, shape in shapes.items() if shape[0]}

    def example(self, n: int) -> tuple[Tensor, ...]:
        """Inputs for n samples: seeds 0 to n-1, random labels, or prompts; for a teacher noise levels spread over its
        range, for a student that is told it guidance scales over its own."""
        noise, labels = noise_and_labels(range(n), self.spec.shape, self.spec.classes)
        given = {"noise": noise, "label": labels}
        if self.kind == "teacher":
            low, high = torch.tensor([max(self.spec.sigma_min, 0.002), self.spec.sigma_max]).log()
            sigma = torch.lerp(low, high, (torch.arange(n) + 0.5) / n).exp()
            given |= {"noisy": noise * sigma[:, None, None, None], "sigma": sigma}
        if self.guidance is not None:
            given["guidance"] = torch.linspace(*self.guidance, n)
        if self.spec.condition == "text":
            text = self.student.text(prompts(n))
            given |= {"states": text.states} | ({} if text.pooled is None else {"pooled": text.pooled})
        for name, shape in self.drawn.items():
            given[name] = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        return tuple(given[name] for name in self.inputs)


def prompts(n: int) -> list[str]:
    """Prompts to compare with."""
    return [PROMPTS[i % 2] for i in range(n)]


def again(source: Loaded, student: Student) -> StudentCall:
    """Another student, called with the inputs of that of `source`."""
    assert isinstance(source.call, StudentCall)
    names = source.call.names
    return NamedCall(student, names) if names else StudentCall(student)


def located(path: str | Path) -> Path:
    """The file or folder of that name, or a builtin teacher's."""
    return asset(BUILTIN[str(path)]) if str(path) in BUILTIN and not Path(path).exists() else Path(path)


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint's file: the file itself, a run folder's best (else last) checkpoint, or a builtin teacher's.
    UserError: none there."""
    return resolve_checkpoint(located(path))


def load_exportable(path: str | Path, student_sigma: float | None = None) -> Loaded:
    """Load a student or teacher checkpoint on the CPU. `student_sigma`: a pickle of NVIDIA's kind is a one-step
    student, called at that noise level. UserError: missing, truncated or foreign file, another kind, a teacher that
    takes text."""
    path = find_checkpoint(path)
    if student_sigma is not None:
        return _pickled_student(path, student_sigma)
    meta = _nvidia_meta(path) if path.suffix == ".pkl" else read_meta(path)
    kind = meta.get("kind") if isinstance(meta, dict) else None
    if kind not in ("student", "teacher"):
        raise UserError(
            f"{path} holds {f'a d2o {kind}' if kind else 'no d2o checkpoint'}; only students and teachers can be"
            " exported"
        )
    try:
        network, spec, fingerprint, call = (_student if kind == "student" else _teacher)(path)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # a d2o record with parts missing or of the wrong type
        raise UserError(
            f"{path}: its metadata is incomplete ({type(error).__name__}: {error})", "expected a file made by `d2o`"
        ) from error
    if spec.condition == "text" and kind == "teacher":
        what = f"{path} is a text-to-image teacher, whose many calls no single graph is"
        raise UserError(what, "--format diffusers writes text-to-image teachers")
    source = Loaded(path, kind, spec, meta, network, fingerprint, call.eval())
    if spec.condition == "text":
        if not spec.text:
            raise UserError(f"{path} takes prompts, and does not say which text encoders read them")
        text = source.student.text
        told = ("guidance",) if source.guidance is not None else ()
        pooled = ("pooled",) if text([""]).pooled is not None else ()
        source.call = NamedCall(source.student, ("noise", "states", *pooled, *told)).eval()
    return source


def for_graph(source: Loaded) -> None:
    """Make it one that a graph can hold: what a student draws for itself becomes an input, adapters are merged."""
    for_any_batch(source.network)
    if source.kind != "student":
        return
    student = source.student
    source.network = student.network = merged(student.network)
    if isinstance(student, StyleStudent) and student.noise == "own":
        student.noise = "const"  # the card says so
    if source.drawn:
        source.call = NamedCall(student, (*source.inputs, *source.drawn)).eval()


def _nvidia_meta(path: Path) -> JsonObject:
    """What a d2o checkpoint of a network in NVIDIA's format says of itself."""
    teacher = load_teacher(path)
    source = {"file": path.name, "sha256": file_sha256(path)}
    return checkpoint_meta("teacher", network_config(teacher.network), teacher.spec, converted_from=source)


def _pickled_student(path: Path, sigma: float) -> Loaded:
    """What the authors of SiD, SiDA and GDD published: the files do not say that they are students, nor their noise
    level."""
    if path.suffix != ".pkl":
        raise UserError(
            f"--student-sigma is for pickles of NVIDIA's kind, which do not say what they are; {path} does",
            "leave it away",
        )
    teacher = load_teacher(path)
    if not 0 < sigma <= teacher.spec.sigma_max:
        raise UserError(
            f"--student-sigma {sigma:g}: expected a noise level above 0, at most {teacher.spec.sigma_max:g}",
            "SiD and SiDA: 2.5",
        )
    student = Student(teacher.network, teacher.spec, sigma).eval()
    meta = checkpoint_meta(
        "student",
        network_config(student.network),
        student.spec,
        student=student.record,
        recipe={},
        metrics={},
        provenance=[],
        teacher={"name": UNSTATED, "licence": teacher.spec.licence},
        converted_from={"file": path.name, "sha256": file_sha256(path)},
    )
    return Loaded(
        path, "student", student.spec, meta, student.network, student.fingerprint, StudentCall(student).eval()
    )


def _student(path: Path) -> tuple[nn.Module, Spec, str, nn.Module]:
    student = load_student(path)
    return student.network, student.spec, student.fingerprint, StudentCall(student)


def _teacher(path: Path) -> tuple[nn.Module, Spec, str, nn.Module]:
    teacher = load_teacher(path)
    return teacher.network, teacher.spec, teacher.fingerprint, DenoiserCall(teacher.network)
