"""What kind of teacher a name or path stands for, found out before any weights are fetched or read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o.errors import UserError
from d2o.inputs import read_json
from d2o.interop import catalogue
from d2o.interop.assets import asset
from d2o.interop.hub import is_repository
from d2o.interop.safetensors_io import read_meta, resolve_checkpoint
from d2o.networks.precond import Denoiser
from d2o.teachers.base import Teacher
from d2o.teachers.registry import BUILTIN

WORDS = {
    "edm": "is a denoiser of the EDM family",
    "text": "is a text-to-image model",
    "diffusers": "is in diffusers' format",
}


@dataclass(frozen=True)
class Kind:
    """`family` "edm" (denoisers of EDM and EDM2, and what `d2o train` makes of their kind), "text" (text-to-image
    models of `d2o train`) or "diffusers"; `arch` and `precond` of the EDM family as `build_network` takes them, None
    where only the weights' file says it; `text`: it makes images of prompts."""

    name: str
    family: str
    arch: str | None = None
    precond: str | None = None
    text: bool = False

    def words(self) -> str:
        """What it is: the end of a sentence about it."""
        if self.family == "edm" and self.arch == "edm2":
            return "is an EDM2 network"
        if self.family == "edm" and self.precond not in (None, "edm"):
            return f"is in preconditioning {self.precond}"
        return WORDS[self.family]


def kind_of(teacher: Teacher) -> Kind:
    """The kind of a teacher that is loaded."""
    network, name = teacher.network, teacher.spec.name
    if isinstance(network, Denoiser) and teacher.spec.condition != "text":
        return _edm(name, {**getattr(network, "config", {}), "precond": network.precond})
    return Kind(
        name,
        "diffusers" if teacher.meta.get("format") == "diffusers" else "text",
        text=teacher.spec.condition == "text",
    )


def look(name: str) -> Kind | None:
    """The kind of teacher that `load_teacher(name)` would give. None where that cannot be known without it: nothing is
    there, or no teacher."""
    if name not in BUILTIN:
        published = catalogue.find(name)
        if published is not None and not Path(name).exists():
            return (
                Kind(name, "diffusers", text=True)
                if published.kind == "diffusers"
                else _edm(name, published.network or {})
            )
    path = asset(BUILTIN[name]) if name in BUILTIN else Path(name)
    if (path / "model_index.json").is_file():
        return Kind(name, "diffusers", text=_has_tokenizer(path / "model_index.json"))
    if not path.exists() and path.suffix not in (".safetensors", ".pkl"):
        return Kind(name, "diffusers") if is_repository(name) else None  # on the hub all are in that format
    if path.suffix == ".pkl":
        return Kind(name, "edm") if path.is_file() else None
    try:
        meta = read_meta(resolve_checkpoint(path))
    except UserError:  # loading says it, and what to do
        return None
    config = meta.get("network")
    if meta.get("kind") != "teacher" or not isinstance(config, dict):
        return None
    return Kind(name, "text", text=True) if config.get("arch") == "text_to_image" else _edm(name, config)


def _edm(name: str, config: dict[str, Any]) -> Kind:
    return Kind(name, "edm", config.get("arch"), config.get("precond", "edm"))


def _has_tokenizer(index: Path) -> bool:
    try:
        parts = read_json(index)
    except UserError:  # loading says it
        return False
    return isinstance(parts, dict) and "tokenizer" in parts
