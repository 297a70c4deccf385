"""What is exported: a checkpoint as one callable module with named inputs, and example inputs to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.diffusion.guidance import Range
from d2o.diffusion.noise import noise_and_labels
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import file_sha256, read_meta, resolve_checkpoint
from d2o.networks.build import network_config
from d2o.networks.lora import merged
from d2o.students.base import Student, checkpoint_meta, load_student
from d2o.students.few_step import FewStepStudent
from d2o.students.style import StyleStudent
from d2o.teachers.base import UNSTATED, Spec
from d2o.teachers.registry import BUILTIN, load_teacher


class StudentCall(nn.Module):
    """forward(noise [N, C, H, W], label [N] int64 if conditional, guidance [N] float32 if it is told that) -> image
    [N, C, H, W] float32: the student as it is, unclipped."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, noise: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None:
            return self.student.call(noise, label, guidance)
        return self.student(noise, label)


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

    def example(self, n: int) -> tuple[Tensor, ...]:
        """Inputs for n samples: seeds 0 to n-1, random labels; for a teacher noise levels spread over its range, for a
        student that is told it guidance scales over its own."""
        noise, labels = noise_and_labels(range(n), self.spec.shape, self.spec.classes)
        given: tuple[Tensor, ...] = (noise,)
        if self.kind == "teacher":
            low, high = torch.tensor([max(self.spec.sigma_min, 0.002), self.spec.sigma_max]).log()
            sigma = torch.lerp(low, high, (torch.arange(n) + 0.5) / n).exp()
            given = (noise * sigma[:, None, None, None], sigma)
        given = given if self.spec.condition == "none" else (*given, labels)
        return given if self.guidance is None else (*given, torch.linspace(*self.guidance, n))


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint's file: the file itself, a run folder's best (else last) checkpoint, or a builtin teacher's.
    UserError: none there."""
    if str(path) in BUILTIN and not Path(path).exists():
        return asset(BUILTIN[str(path)])
    return resolve_checkpoint(path)


def load_exportable(path: str | Path, student_sigma: float | None = None, text: bool = False) -> Loaded:
    """Load a student or teacher checkpoint on the CPU. `student_sigma`: a pickle of NVIDIA's kind is a one-step
    student, called at that noise level. UserError: missing, truncated or foreign file, another kind,
    text-conditioned (unless `text`)."""
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
    if spec.condition == "text" and not text:
        what = (
            f"{path} is conditioned on text; only unconditional and label-conditioned networks can be exported in this"
            " format"
        )
        raise UserError(what, "--format diffusers writes text-to-image teachers and their students")
    return Loaded(path, kind, spec, meta, network, fingerprint, call.eval())


def for_graph(source: Loaded) -> None:
    """Make the student one that a graph can hold: without random numbers of its own, adapters merged. UserError: one
    that draws them between its calls."""
    student = getattr(source.call, "student", None)
    if student is None:
        return
    if student.nfe > 1 and not isinstance(student, FewStepStudent):
        what = f"{source.path} draws noise of its own between its {student.nfe} network calls, which a graph cannot"
        raise UserError(what, "--format safetensors keeps it as it is")
    source.network = student.network = merged(student.network)
    if isinstance(student, StyleStudent) and student.noise == "own":
        student.noise = "const"  # the card says so


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
