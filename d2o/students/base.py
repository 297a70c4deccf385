"""The student contract: student(noise, condition) -> x in one network call (or a few), and its self-describing
checkpoint."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.condition import Asked, Condition, Embedded, Guided
from d2o.diffusion.guidance import Range
from d2o.diffusion.levels import DiscreteLevels
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import load_file, resolve_checkpoint, save_file, tensors_sha256
from d2o.networks.build import build_network, network_config
from d2o.networks.config import Config
from d2o.networks.edm_view import EDMView, called_at
from d2o.networks.load import load_weights
from d2o.networks.scale_input import scale_embedding
from d2o.spaces.base import UNNAMED, LatentSpace
from d2o.spaces.load import load_space
from d2o.students.on_base import on_base
from d2o.teachers.base import Spec, check_labels, embed_labels
from d2o.teachers.text import TextEncoders, check_text, embed_prompts, kept_text
from d2o.teachers.text_encoders import load_text
from d2o.version import __version__

STUDENTS = {
    "denoiser": "d2o.students.base",
    "multistep": "d2o.students.multistep",
    "style": "d2o.students.style",
    "consistency": "d2o.students.consistency",
    "few_step": "d2o.students.few_step",
}
"""Kind, as checkpoints state it -> module, which has a class `STUDENT`."""
ROUNDING = 1e-5
"""Of a guidance scale that was float32."""


class Student(nn.Module):
    """A denoiser called once at a fixed noise level: x = D(sigma z; sigma, c); of a teacher with a discrete schedule
    the nearest of its levels. `begins` "x_T": D(sqrt(1 + sigma^2) z; sigma, c), so that the network itself sees z,
    unscaled: (z - sigma_T eps(z, c, T)) / alpha_T (Kang et al. 2024, eq. 7); for networks with a discrete schedule.
    `guidance`: the range of guidance scales for which it was trained, if it is told them (`networks.scale_input`).

    forward(noise [B, C, H, W] standard normal, condition) -> x [B, C, H, W] float32; the condition is a `Condition`
    (with guidance scales where, and only where, it is told them), or what `embed` made of one. `config` rebuilds it.
    Other kinds of students override `forward`, `nfe`, `record` and `from_record`; image i depends on its noise and
    condition alone in all of them.
    """

    nfe = 1  # network calls of one sample

    def __init__(
        self,
        network: nn.Module,
        spec: Spec,
        sigma: float = 80.0,
        begins: str = "noise",
        guidance: Range | None = None,
    ):
        super().__init__()
        self.network, self.spec, self.sigma = network, spec, called_at(network, float(sigma))
        self.begins, self.factor, self.guidance = begins, factor_of(network, self.sigma, begins), guidance
        self.meta: JsonObject = {}
        self._text: TextEncoders | None = None
        self._space: LatentSpace | None = None

    @property
    def record(self) -> JsonObject:
        """What a checkpoint states beside network and spec: the kind, and that kind's settings."""
        record: JsonObject = {"kind": "denoiser", "sigma": self.sigma}
        record |= {"begins": self.begins} if self.begins != "noise" else {}
        return record | ({"guidance": list(self.guidance)} if self.guidance is not None else {})

    @classmethod
    def from_record(cls, network: nn.Module, spec: Spec, record: JsonObject) -> Student:
        """Undo `record`."""
        guidance = record.get("guidance")
        told = None if guidance is None else (guidance[0], guidance[1])
        return cls(network, spec, record["sigma"], record.get("begins", "noise"), told)

    def with_steps(self, steps: int) -> Student:
        """The same student, called `steps` times for an image. UserError: a number that its kind cannot do."""
        if steps != self.nfe:
            often = "one network call" if self.nfe == 1 else f"{self.nfe} network calls"
            what = f"--steps {steps}: this student makes an image in {often}"
            raise UserError(what, "leave --steps away: it is for teachers and consistency students")
        return self

    @property
    def config(self) -> JsonObject:
        rest = dict(self.record)
        return {"student": rest.pop("kind"), **rest, "network": network_config(self.network)}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def text(self) -> TextEncoders:
        """The text encoders of prompts, which the checkpoint names. UserError: they are not here, or are others than
        those that it was trained with."""
        if self._text is None or self._text.device.type != self.device.type:
            text = load_text(self._from(self.spec.text, "text encoders"), self.device)
            text.check(self._needs("text"), f"the student of {self.spec.name}")
            self._text = text
        return self._text

    @property
    def space(self) -> LatentSpace:
        """The space of its samples, which the checkpoint names. UserError as `text`."""
        if self._space is None or self._space.device.type != self.device.type:
            if self.spec.space == UNNAMED:
                raise UserError(
                    f"a student of {self.spec.name} makes latents, and its checkpoint does not say how they become"
                    " images"
                )
            space = load_space(self._from(self.spec.space, "autoencoder"), self.device)
            space.check(self._needs("space"), f"the student of {self.spec.name}")
            self._space = space
        return self._space

    def fetch(self) -> None:
        """Load now what it takes from elsewhere, where an image would come to need it. UserError as `text`."""
        if self.spec.condition == "text":
            _ = self.text
        if self.spec.latent:
            _ = self.space.autoencoder

    def _from(self, name: str, what: str) -> str:
        """The name itself. UserError: it is that of a folder or file which is gone."""
        if Path(name).is_absolute() and not Path(name).exists():
            raise UserError(
                f"the student of {self.spec.name} takes its {what} from {name}, and nothing is there",
                "put back what it was trained with",
            )
        return name

    def _needs(self, what: str) -> JsonObject:
        return (self.meta.get("needs") or {}).get(what) or {}

    def embed(self, condition: Condition | Asked) -> Asked:
        """What the network takes, on its device; what is embedded already comes back as it is. UserError: of a kind
        that this student does not take."""
        if isinstance(condition, Guided):
            return condition
        if self.spec.condition != "text":
            found = embed_labels(self.spec, condition, self.device)
        else:
            found = embed_prompts(self.spec, condition, lambda prompts: self.text(prompts))
        scale = condition.guidance if isinstance(condition, Condition) else None
        return found if scale is None else Guided(found, scale.to(self.device))

    def check_condition(self, embedded: Asked, batch: int) -> Embedded:
        """The embedded condition if it fits, without its guidance scales. UserError: none, another number than the
        batch, classes out of range; guidance scales out of range, or none where, and only where, it is told them."""
        scale = embedded.scale if isinstance(embedded, Guided) else None
        if scale is None or self.guidance is None:
            self.check_cfg(None if scale is None else float(scale[0]))
        elif scale.device.type == "cpu":  # elsewhere nothing waits for the device
            for end in (scale.min(), scale.max()):
                self.check_cfg(float(end))
        check = check_text if self.spec.condition == "text" else check_labels
        return check(self.spec, embedded.embedded if isinstance(embedded, Guided) else embedded, batch)

    def check_cfg(self, cfg: float | None) -> float | None:
        """The guidance scale if it is told one that it was trained for, or if there is none to tell. UserError."""
        if self.guidance is None:
            if cfg is not None:
                raise UserError(
                    f"the student of {self.spec.name} is not told a guidance scale (cfg {cfg:g}): it has that of its"
                    " pairs for good",
                    "leave it away; `pairs.cfg: [1, 8]` trains one that is",
                )
            return None
        low, high = self.guidance
        if cfg is None:
            raise UserError(
                f"the student of {self.spec.name} is told the guidance scale, and none is given",
                f"give one from {low:g} to {high:g}: --cfg {(low + high) / 2:g}, or condition.guided(scale)",
            )
        if not low - ROUNDING <= cfg <= high + ROUNDING:
            raise UserError(
                f"cfg {cfg:g}: the student of {self.spec.name} was trained for guidance scales from {low:g} to {high:g}"
            )
        return cfg

    def forward(self, noise: Tensor, condition: Condition | Asked = None) -> Tensor:
        asked = self.embed(condition)
        scale = asked.scale if isinstance(asked, Guided) else None
        return self.call(noise, self.check_condition(asked, len(noise)), scale)

    def call(self, noise: Tensor, embedded: Embedded, scale: Tensor | None = None) -> Tensor:
        """`forward` of what the network takes, unchecked."""
        told = () if scale is None else (scale_embedding(scale),)
        sigma = noise.new_full((1,), self.sigma, dtype=torch.float32)
        return self.network(noise.to(torch.float32) * self.factor, sigma, embedded, *told)

    def decode(self, x: Tensor) -> Tensor:
        """Diffusion space -> images in [-1, 1]. UserError: latents that only the teacher can decode."""
        return self.space.decode(x) if self.spec.latent else x.clamp(*self.spec.value_range)

    @property
    def fingerprint(self) -> str:
        return tensors_sha256(self.network.state_dict())


def factor_of(network: nn.Module, sigma: float, begins: str) -> float:
    """What standard normal noise is multiplied by. UserError: "x_T" of a network whose inputs keep no variance."""
    if begins != "x_T":
        return sigma
    if not isinstance(network, EDMView) or not isinstance(network.levels, DiscreteLevels):
        raise UserError(
            "student.begins: x_T is for networks with a discrete schedule, as Stable Diffusion's", "begins: noise"
        )
    return math.sqrt(1 + sigma**2)


def build_student(config: Config, spec: Spec) -> Student:
    """The untrained student that `config` describes."""
    return make_student(build_network(config["network"]), spec, {**config, "kind": config["student"]})


def make_student(network: nn.Module, spec: Spec, record: JsonObject) -> Student:
    """The student of the kind that `record`, the `student` entry of a checkpoint, states. UserError: an unknown
    kind."""
    kind = record["kind"]
    if kind not in STUDENTS:
        raise unknown("kind of student", str(kind), STUDENTS)
    return import_module(STUDENTS[kind]).STUDENT.from_record(network, spec, record)


def checkpoint_meta(kind: str, network: Config, spec: Spec | None, **more: object) -> JsonObject:
    """The metadata of a checkpoint: what it is, and what made it."""
    record = {"format": "d2o", "version": 1, "kind": kind, "network": network, "d2o": __version__, **more}
    if spec is not None:
        record["spec"] = spec.to_dict()
        if kind == "student" and (needs := needs_of(spec)):
            record["needs"] = needs
    return record


def needs_of(spec: Spec) -> JsonObject:
    """What a student of that spec takes from elsewhere: text encoders and latent space, by name, revision and hash (of
    published ones, which come from one place, by name and revision). Empty if it needs nothing."""
    needs: JsonObject = {}
    if spec.text:
        needs["text"] = (kept_text(spec.text) or load_text(spec.text)).record
    if spec.latent and spec.space != UNNAMED:
        needs["space"] = load_space(spec.space, "cpu").record
    return needs


def save_student(path: str | Path, student: Student, **more: object) -> None:
    """Write weights and everything needed to rebuild and trace the student."""
    meta = checkpoint_meta("student", network_config(student.network), student.spec, student=student.record, **more)
    save_file(path, student.network.state_dict(), meta)


def load_student(path: str | Path, device: str | torch.device = "cpu") -> Student:
    """A student from its checkpoint or run folder, in eval mode. UserError: missing, truncated or foreign file, or not
    a student; a LoRA whose teacher is not here."""
    path = resolve_checkpoint(path)
    tensors, meta = load_file(path)
    if meta.get("kind") != "student":
        raise UserError(
            f"{path} holds a {meta.get('kind', 'foreign object')}, not a student",
            "teachers are loaded with d2o.load_teacher",
        )
    if isinstance(meta.get("student"), dict) and meta["student"].get("kind") not in STUDENTS:
        raise unknown(f"kind of student in {path}", str(meta["student"].get("kind"))[:40], STUDENTS)
    check_checkpoint(meta, path)
    load = on_base if meta["network"].get("lora") else load_weights
    student = make_student(load(meta["network"], tensors, path), Spec.from_dict(meta["spec"], path), meta["student"])
    student.meta = meta
    return student.to(device).eval().requires_grad_(False)


STUDENT = Student
