"""The protocol of a measurement: every choice that changes a number, checked, and written into the result."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.draws import check_range, draw, label_mode
from d2o.data.prompts import Prompts
from d2o.diffusion.solvers import get_solver
from d2o.errors import UserError
from d2o.evaluation.prepare import Preparation, parse_preparation
from d2o.inputs import JsonObject
from d2o.teachers.base import Spec

QUANTIZE = ("edm_round", "dmd_trunc")
REPORTS = ("mean", "min")
DTYPES = ("float32", "float16", "float64")
IS_MODES = ("torch_fidelity", "edm_order", "adm")


@dataclass(frozen=True)
class Settings:
    """How X is sampled and compared. UserError for values out of range."""

    n: int = 4000  # generated images a run
    seed: int = 1_000_000  # of image 0; image i comes from seed + i
    labels: str | None = None  # as data.draws.label_mode: "random" (default), "balanced", or class indices in turn
    prompts: str | tuple[str, ...] | None = None  # a file, or prompts; image i has prompt i mod their number
    batch: int = 250
    solver: str | None = None  # of teachers; None: the teacher's usual one
    steps: int | None = None
    teacher_solver: str | None = None  # of the teacher that X is measured against; None: its usual one
    teacher_steps: int | None = None
    teacher_n: int | None = None  # its images for rel-fd and rel-fid, and the seed of the first; None: those of X
    teacher_seed: int | None = None
    guide: str | None = None  # by whom teachers are guided (None: by themselves, without a condition)
    cfg: float | None = None  # guidance of teachers (None: 1, which is none), and of students that are told it
    repeats: int = 1  # runs over disjoint blocks of seeds
    report_as: str = "mean"  # of several runs: "mean" (with the deviation) or "min", as EDM reports
    bootstrap: int = 0  # resamplings of the images for the error of a single run
    distance_n: int = 256  # images beside the teacher's of equal noise
    resize: str = "none"  # of images before they are scored, see metrics.prepare
    quantize: str = "edm_round"  # of generated images to 8 bits
    pr_k: int = 3  # neighbours of precision and recall
    dc_k: int = 5  # of density and coverage
    pr_dtype: str = "float32"  # in which features are stored for these four
    kid_subsets: int = 100
    kid_size: int = 1000
    is_splits: int = 10
    is_mode: str = "torch_fidelity"
    clip_model: str = "clip-vit-g-14"  # of the CLIP score
    per_prompt: int = 8  # images of one prompt for DreamDiv

    def __post_init__(self) -> None:
        lows = {
            "n": 2,
            "batch": 1,
            "repeats": 1,
            "distance_n": 1,
            "bootstrap": 0,
            "pr_k": 1,
            "dc_k": 1,
            "kid_subsets": 1,
            "kid_size": 2,
            "is_splits": 1,
            "per_prompt": 2,
        }
        for name, low in lows.items():
            if getattr(self, name) < low:
                raise UserError(f"{option(name)} must be at least {low}, not {getattr(self, name)}")
        for name, steps in (("steps", self.steps), ("teacher_steps", self.teacher_steps)):
            if steps is not None and steps < 1:
                raise UserError(f"{option(name)} must be at least 1, not {steps}")
        if self.teacher_n is not None and self.teacher_n < 2:
            raise UserError(f"--teacher-n must be at least 2, not {self.teacher_n}")
        if self.bootstrap == 1:
            raise UserError("--bootstrap 1 gives no error bar", "give some hundred, or 0 for none")
        choices = {"quantize": QUANTIZE, "report_as": REPORTS, "pr_dtype": DTYPES, "is_mode": IS_MODES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{option(name)} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        parse_preparation(self.resize)
        for solver in (self.solver, self.teacher_solver):
            if solver is not None:
                get_solver(solver)
        check_range(max(self.n * self.repeats, self.distance_n), self.seed)
        if self.own_teacher_images:
            check_range(self.teachers.n, self.teachers.seed)

    @property
    def own_teacher_images(self) -> bool:
        """Whether the teacher's images are others than X's, one set beside which all runs of X are seen."""
        return self.teacher_n is not None or self.teacher_seed is not None

    @property
    def teachers(self) -> Settings:
        """Those of the teacher's images in rel-fd and rel-fid."""
        n = self.n if self.teacher_n is None else self.teacher_n
        seed = self.seed if self.teacher_seed is None else self.teacher_seed
        return replace(self, n=n, seed=seed, repeats=1, teacher_n=None, teacher_seed=None)

    @property
    def preparation(self) -> Preparation:
        """What is done to generated images. --resize crop is for sets of images: generators make one size."""
        return parse_preparation("none" if self.resize == "crop" else self.resize)


def option(name: str) -> str:
    """A setting as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def noise_for(
    spec: Spec,
    seeds: range,
    labels: str | None = None,
    first_seed: int | None = None,
    prompts: Prompts | None = None,
    per_prompt: int = 1,
) -> tuple[Tensor, Condition]:
    """Noise [n, C, H, W] of the images of these seeds, and what they are asked to be.

    `first_seed` (default: the first of them) is image 0, from which balanced and listed labels count, and prompts: each
    for `per_prompt` images, in turn. The noise of a seed is the same under every condition. UserError: labels that
    `spec` doesn't have.
    """
    first = seeds[0] if first_seed is None else first_seed
    start = seeds[0] - first
    if spec.condition == "text":
        assert prompts is not None
        noise, _ = draw(first, start, len(seeds), spec.shape, 0, "none")
        numbers = ((i // per_prompt) % len(prompts) for i in range(start, start + len(seeds)))
        return noise, Condition.of_prompts(prompts.many(numbers))
    mode = label_mode(labels, spec.classes, spec.name)
    noise, found = draw(first, start, len(seeds), spec.shape, spec.classes, mode)
    return noise, Condition(len(seeds), found)


OWN = "own"
"""Features of a network that is itself what is measured."""


def protocol_line(protocol: JsonObject) -> str:
    """A record's protocol in one line, for footers."""
    if protocol["features"] == OWN:
        drawn = ["seeds {}..{}".format(*protocol["seeds"])] if protocol["seeds"] else []
        return " · ".join(
            [f"{protocol['ref']}, n = {_count(protocol['n_ref'])}", *drawn, f"resize {protocol['resize']}"]
        )
    stated = {
        key: "not stated" if protocol[key] in (None, "") else protocol[key]
        for key in ("n_gen", "resize", "quantize", "n_ref")
    }
    parts = [
        f"n = {_count(stated['n_gen'])}"
        + (f" in each of {protocol['repeats']} runs" if protocol["repeats"] > 1 else "")
    ]
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


def hardware(device: str | torch.device = "cpu") -> JsonObject:
    """What the measurement ran on."""
    record: JsonObject = {
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
