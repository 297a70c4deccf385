"""What kind of teacher a name or path stands for, found out before any weights are fetched or read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from d2o.errors import UserError
from d2o.inputs import JsonObject, read_json
from d2o.interop import catalogue
from d2o.interop.assets import asset
from d2o.interop.hub import INDEX, is_diffusers_folder, is_repository
from d2o.interop.safetensors_io import read_meta, resolve_checkpoint
from d2o.networks.config import Config
from d2o.networks.precond import Denoiser
from d2o.teachers.base import GUIDED_BY, Teacher
from d2o.teachers.in_edm import ViewTeacher
from d2o.teachers.registry import BUILTIN

FAMILIES = {
    "edm": "denoisers of EDM in its own preconditioning (and what `d2o train` makes of that kind)",
    "edm-other": "denoisers of EDM in other preconditionings (VP, VE, iDDPM)",
    "edm2": "EDM2, on latents",
    "ddpm": "DDPM's U-Nets in diffusers' format, unconditional or by class",
    "sd": "Stable Diffusion 1, 2 and XL, and text-to-image models of `d2o train`",
    "flow": "flow transformers (Stable Diffusion 3)",
}
"""The families of teachers, as far as methods tell them apart."""
TEXT = ("sd", "flow")
"""Those that take prompts."""
PIPELINES = {
    "DDPMPipeline": "ddpm",
    "DDIMPipeline": "ddpm",
    "PNDMPipeline": "ddpm",
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sd",
    "StableDiffusion3Pipeline": "flow",
}
"""What a diffusers folder holds -> its family."""
NETWORKS = {"UNet2DModel": "ddpm", "UNet2DConditionModel": "sd", "SD3Transformer2DModel": "flow"}
"""Likewise of a network."""
UNKNOWN = "diffusers"
"""The family of a repository of the hub, of which nothing but its name is known."""


@dataclass(frozen=True)
class TeacherKind:
    """`family`: one of `FAMILIES`, or `UNKNOWN`; `arch` and `precond` of the EDM family as `build_network` takes them,
    None where only the weights' file says it; `text`: it makes images of prompts."""

    name: str
    family: str
    arch: str | None = None
    precond: str | None = None
    text: bool = False

    def words(self) -> str:
        """What it is: the end of a sentence about it."""
        if self.family == "edm-other":
            return f"is in preconditioning {self.precond}"
        return {
            "edm": "is a denoiser of the EDM family",
            "edm2": "is an EDM2 network",
            "ddpm": "is a U-Net of DDPM's kind in diffusers' format",
            "sd": "is a text-to-image model of Stable Diffusion's kind",
            "flow": "is a flow transformer",
        }.get(self.family, "is in diffusers' format")


def kind_of(teacher: Teacher) -> TeacherKind:
    """The kind of a teacher that is loaded."""
    teacher = teacher.teacher if isinstance(teacher, ViewTeacher) else teacher
    network, name, text = teacher.network, teacher.spec.name, teacher.spec.condition == "text"
    if isinstance(network, Denoiser):
        return replace(_edm(name, {**getattr(network, "config", {}), "precond": network.precond}), text=text)
    return TeacherKind(name, NETWORKS.get(type(network).__name__, UNKNOWN), text=text)


def expected_kind(name: str) -> TeacherKind | None:
    """The kind of teacher that `load_teacher(name)` would give. None where that cannot be known without it: nothing is
    there, or no teacher."""
    name = name.partition(GUIDED_BY)[0]
    if name not in BUILTIN:
        published = catalogue.find(name)
        if published is not None and not Path(name).exists():
            if published.kind != "diffusers":
                return _edm(name, published.network or {})
            return TeacherKind(name, "flow" if published.solver == "euler" else "sd", text=True)
    path = asset(BUILTIN[name]) if name in BUILTIN else Path(name)
    if is_diffusers_folder(path):
        index = _index(path / INDEX)
        return TeacherKind(name, PIPELINES.get(str(index.get("_class_name")), UNKNOWN), text="tokenizer" in index)
    if not path.exists() and path.suffix not in (".safetensors", ".pkl"):
        return TeacherKind(name, UNKNOWN) if is_repository(name) else None  # on the hub all are in that format
    if path.suffix == ".pkl":
        return TeacherKind(name, "edm") if path.is_file() else None
    try:
        meta = read_meta(resolve_checkpoint(path))
    except UserError:  # loading says it, and what to do
        return None
    config = meta.get("network")
    if meta.get("kind") != "teacher" or not isinstance(config, dict):
        return None
    return TeacherKind(name, "sd", text=True) if config.get("arch") == "text_to_image" else _edm(name, config)


def _edm(name: str, config: Config) -> TeacherKind:
    arch, precond = config.get("arch"), config.get("precond", "edm")
    family = "edm2" if arch == "edm2" else "edm" if precond in ("edm", "consistency") else "edm-other"
    return TeacherKind(name, family, arch, precond)


def _index(path: Path) -> JsonObject:
    try:
        parts = read_json(path)
    except UserError:  # loading says it
        return {}
    return parts if isinstance(parts, dict) else {}
