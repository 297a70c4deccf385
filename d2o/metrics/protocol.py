"""The protocol of a measurement: every choice that changes a number, checked, and written into the result."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2o.data.draws import check_range, draw, label_mode
from d2o.diffusion.solvers import get_solver
from d2o.errors import UserError
from d2o.teachers.base import Spec

QUANTIZE = "edm_round"  # x * 127.5 + 128, clipped, truncated: what EDM and its followers score
RESIZES = ("none", "crop")


@dataclass(frozen=True)
class Settings:
    """How X is sampled and compared. UserError for values out of range."""

    n: int = 4000  # generated images a run
    seed: int = 1_000_000  # of image 0; image i comes from seed + i
    labels: str | None = None  # as data.draws.label_mode: "random" (default), "balanced", or class indices in turn
    batch: int = 250
    solver: str = "heun"  # of teachers
    steps: int = 18
    cfg: float = 1.0
    repeats: int = 1  # runs over disjoint blocks of seeds
    distance_n: int = 256  # images of the teacher-student distance
    resize: str = "none"  # of sets of images: "none" refuses another size, "crop" scales and centre-crops

    def __post_init__(self) -> None:
        for name, low in (("n", 2), ("batch", 1), ("steps", 1), ("repeats", 1), ("distance_n", 1)):
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(self, name)}")
        if self.resize not in RESIZES:
            raise UserError(f"--resize must be one of {', '.join(RESIZES)}, not {self.resize!r}")
        get_solver(self.solver)
        check_range(max(self.n * self.repeats, self.distance_n), self.seed)


def noise_for(spec: Spec, seeds: range, labels: str | None = None, first_seed: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Noise [n, C, H, W] and class indices [n] (None for an unconditional `spec`) of the images of these seeds.

    `first_seed` (default: the first of them) is image 0, from which balanced and listed labels count. The noise of a seed is the same under
    every choice of labels. UserError: labels that `spec` doesn't have.
    """
    if spec.condition == "text":
        raise UserError(f"{spec.name!r} is conditioned on text; `d2o eval` has no prompts for it yet")
    first = seeds[0] if first_seed is None else first_seed
    return draw(first, seeds[0] - first, len(seeds), spec.shape, spec.classes, label_mode(labels, spec.classes, spec.name))


def metric_label(extractor: str) -> str:
    """The name under which a Fréchet distance is printed. Never "FID": that is the 2015 Inception network's, at 50,000 images."""
    return f"FD({extractor})"


def protocol_line(protocol: dict[str, Any]) -> str:
    """A record's protocol in one line, for footers."""
    stated = {key: "not stated" if protocol[key] in (None, "") else protocol[key] for key in ("n_gen", "resize", "quantize", "n_ref")}
    parts = [f"n = {_count(stated['n_gen'])}" + (f" in each of {protocol['repeats']} runs" if protocol["repeats"] > 1 else "")]
    if protocol["seeds"]:
        parts.append("seeds {}..{}".format(*protocol["seeds"]))
    if protocol["labels"]:
        parts.append(f"labels {protocol['labels']}")
    sha = protocol["weights_sha256"]
    parts.append(f"features {protocol['features']}, weights {sha[:12] if sha else 'not stated'}")
    parts += [f"resize {stated['resize']}", f"quantise {stated['quantize']}"]
    if protocol["ref"]:
        parts.append(f"reference {protocol['ref']}, n = {_count(stated['n_ref'])}")
    return " · ".join(parts)


def _count(n: int | str) -> str:
    return f"{n:,}" if isinstance(n, int) else n


def hardware(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What the measurement ran on."""
    record: dict[str, Any] = {
        "device": torch.device(device).type,
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if torch.device(device).type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
    return record


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
