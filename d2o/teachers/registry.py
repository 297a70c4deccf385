"""Teachers by name or path."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from d2o.errors import UserError, nearest
from d2o.interop.nvidia_pickle import read_nvidia_pickle
from d2o.interop.safetensors_io import load_file, resolve_checkpoint
from d2o.networks.build import build_network
from d2o.teachers.base import Spec, Teacher

BUILTIN = {"digits": "teacher_digits.safetensors"}
"""Name -> file in d2o/assets."""
NVIDIA_LICENCE = "CC BY-NC-SA 4.0 (NVIDIA)"


def teacher_names() -> list[str]:
    return sorted(BUILTIN)


def asset(name: str) -> Path:
    """Path of a file that ships with the package."""
    return Path(str(resources.files("d2o") / "assets" / name))


def load_teacher(name_or_path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Teacher:
    """A builtin teacher (`digits`), a teacher's checkpoint or run folder that `d2o train` wrote, or an EDM network as NVIDIA published it (`.pkl`).

    `dtype` bfloat16 runs the network under autocast. UserError: unknown name (with the list), missing, truncated or foreign file.
    """
    name = str(name_or_path)
    if name in BUILTIN:
        path = asset(BUILTIN[name])
    else:
        path = Path(name)
        if not path.exists() and path.suffix not in (".safetensors", ".pkl"):
            near = nearest(name, BUILTIN)
            raise UserError(
                f"unknown teacher {name!r}" + (f": did you mean {near!r}?" if near else ""),
                f"known: {', '.join(teacher_names())}; or the path of a teacher's .safetensors checkpoint or EDM's .pkl",
            )
        path = resolve_checkpoint(path)
    nvidia = path.suffix == ".pkl"
    tensors, meta = _load_nvidia(path) if nvidia else load_file(path)
    if meta.get("kind") != "teacher":
        raise UserError(f"{path} holds a {meta.get('kind', 'foreign object')}, not a teacher", "students are loaded with d2o.load_student")
    spec = Spec.from_dict(meta["spec"])
    if name in BUILTIN:
        spec = replace(spec, name=name)
    teacher = Teacher(load_weights(meta["network"], tensors, path, assign=nvidia), spec, device, dtype)
    teacher.meta = meta
    return teacher


def _load_nvidia(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An EDM `.pkl` in the form in which `load_file` gives a teacher's checkpoint."""
    found = read_nvidia_pickle(path)
    network = found.config()
    size, classes = network["img_resolution"], network.get("label_dim", 0)
    shape = (network["img_channels"], size, size)
    spec = Spec(path.stem, shape, condition="label" if classes else "none", classes=classes, licence=NVIDIA_LICENCE)
    tensors = {name: tensor.to(torch.float32) for name, tensor in found.state_dict.items()}
    return tensors, {"format": "nvidia", "kind": "teacher", "network": network, "spec": spec.to_dict()}


def load_weights(network: dict[str, Any], tensors: dict[str, torch.Tensor], path: str | Path, assign: bool = False) -> torch.nn.Module:
    """Build the network that a checkpoint describes and load its tensors. UserError when they do not fit.

    `assign`: the tensors become the weights, uncopied; nothing is allocated for a network that they do not fit.
    """
    with torch.device("meta") if assign else nullcontext():
        module = build_network(network)
    try:
        module.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        detail = str(error).strip().splitlines()
        raise UserError(f"{path}: the weights do not fit the network that the file describes ({detail[-1].strip()})") from error
    return module
