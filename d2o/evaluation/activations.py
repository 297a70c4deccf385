"""How active each layer of a diffusion model's U-Net is at each noise level of sampling (Zheng & Yang 2024, GDD,
section 4.1 and Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from d2o.data.draws import check_range, label_mode
from d2o.diffusion.schedules import EDMSchedule, Grid, karras_sigma
from d2o.diffusion.solvers import PLAIN
from d2o.errors import UserError, unknown
from d2o.evaluation.collect import ImageBatch, OpenMeter, Pass, check_images, silent
from d2o.evaluation.extractor import Device
from d2o.evaluation.protocol import hardware, noise_for
from d2o.evaluation.workplace import Workplace
from d2o.inputs import JsonObject
from d2o.networks.build import count_parameters
from d2o.networks.unet_layers import BlockLayer, last_convolutions
from d2o.runtime import worker
from d2o.version import __version__

if TYPE_CHECKING:
    from d2o.data.prompts import Prompts
    from d2o.teachers.base import Teacher

FORMAT = {"format": "d2o-activations", "version": 1}
PAPER = "GDD (arXiv 2405.20750), section 4.1 and Fig. 3"
STATS = ("mean_abs", "rms", "mean")
SOLVERS = {"heun": 2, "euler": 1, "dpmpp": 1}
"""Solver -> network calls a step, of which the first is at the step's own point."""
STEPS, IMAGES = 256, 64
PROMINENT = 0.05
"""Of a layer's range: a local maximum that stands out less is none."""


@dataclass(frozen=True)
class ActivationSettings:
    """`steps` N; `stat`: the scalar of a layer's output [C, H, W] for each image, which the paper does not name:
    "mean_abs", "rms" or "mean"; `n` images from seed on, averaged. UserError for values out of range."""

    steps: int = STEPS
    solver: str = "heun"
    stat: str = "mean_abs"
    n: int = IMAGES
    seed: int = 1_000_000
    labels: str | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        if self.stat not in STATS:
            raise unknown("statistic of activations", self.stat, STATS)
        if self.solver not in SOLVERS:
            raise unknown("solver for --activations", self.solver, SOLVERS)
        for name, low in (("steps", 2), ("n", 1), ("batch", 1)):
            if getattr(self, name) < low:
                raise UserError(f"--{name} must be at least {low}, not {getattr(self, name)}")
        check_range(self.n, self.seed)


def time_grid(teacher: Teacher, steps: int) -> Grid:
    """Points i = N, ..., 0. For the EDM family at T(i, N), sigma_max at i = N and sigma_min at i = 0 (GDD, eq. 5, which
    is Karras et al. 2022, eq. 5, with N + 1 points and without a last step to 0); else the teacher's own steps."""
    schedule = teacher.schedule
    if not isinstance(schedule, EDMSchedule):
        return schedule.grid(steps)
    down = torch.arange(steps + 1, dtype=torch.float64) / steps
    sigmas = karras_sigma(down, max(0.002, schedule.sigma_min), min(80.0, schedule.sigma_max))
    if schedule.round_sigma is not None:
        sigmas = schedule.round_sigma(sigmas).to(torch.float64).cpu()
    return Grid(sigmas, torch.ones_like(sigmas), sigmas, float(sigmas[0]))


@dataclass
class Active(ImageBatch):
    """With `activations` [k, layers, steps] float32."""

    activations: Tensor | None = None


class ActivationProbe:
    """The activations of every image, a row each; of "rms" the mean squares, which are averaged over images."""

    def __init__(self, layers: Sequence[BlockLayer], settings: ActivationSettings):
        self.identity: JsonObject = {"activations": settings.stat, "layers": [layer.name for layer in layers]}

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        assert isinstance(batch, Active) and batch.activations is not None
        return {"activations": batch.activations.flatten(1)}


def _scalar(x: Tensor, stat: str) -> Tensor:
    """[B, C, H, W] -> [B] float32."""
    x = x.float().flatten(1)
    return (x.abs() if stat == "mean_abs" else x.square() if stat == "rms" else x).mean(1)


@torch.inference_mode()
def activations(
    teacher: Teacher,
    layers: Sequence[BlockLayer],
    settings: ActivationSettings,
    seeds: range,
    prompts: Prompts | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples [B, C, H, W] in [-1, 1] of these seeds, and the scalars [B, layers, steps] of the network's calls at
    points i = N, ..., 1. A step's other calls (Heun's) are not counted."""
    noise, condition = noise_for(teacher.spec, seeds, settings.labels, settings.seed, prompts)
    noise, grid = noise.to(teacher.device), time_grid(teacher, settings.steps)
    prepared = teacher.prepare(teacher.check_condition(teacher.embed(condition), len(noise)))
    found = torch.zeros(len(layers), settings.steps, len(noise), device=noise.device)
    calls, every = 0, SOLVERS[settings.solver]

    def watch(row: int) -> None:
        def look(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            if calls % every == 0:
                found[row, calls // every] = _scalar(out, settings.stat)

        hooks.callback(layers[row].conv.register_forward_hook(look).remove)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        out = teacher.denoise(x, t, prepared)
        calls += 1
        return out

    with ExitStack() as hooks:
        for row in range(len(layers)):
            watch(row)
        x = PLAIN[settings.solver](denoise, noise.to(torch.float64) * grid.start, grid)
    return teacher.decode(x.to(torch.float32)), found.permute(2, 0, 1)


def measure_activations(
    teacher: Teacher,
    source: str,
    settings: ActivationSettings,
    *,
    name: str | None = None,
    prompts: Prompts | None = None,
    device: Device = "cpu",
    place: Workplace | None = None,
    meter: OpenMeter = silent,
) -> JsonObject | None:
    """The record of a teacher's layer activations; None for a worker that is not the first. Global random state is
    neither used nor changed.

    UserError: no U-Net, labels that it does not have, images that are not finite.
    """
    place = place or Workplace(memory=True)
    label = name or teacher.spec.name
    layers = last_convolutions(teacher.network, label)
    spec = teacher.spec
    labels = label_mode(settings.labels, spec.classes, spec.name) if spec.condition != "text" else None
    grid = time_grid(teacher, settings.steps)

    def make(numbers: range) -> ImageBatch:
        seeds = range(settings.seed + numbers.start, settings.seed + numbers.stop)
        images, found = activations(teacher, layers, settings, seeds, prompts)
        check_images(images, seeds, label)
        return Active(images, activations=found.cpu())

    identity = {
        "sha256": teacher.fingerprint,
        "kind": "activations",
        "solver": settings.solver,
        "steps": settings.steps,
        "seed": settings.seed,
        "labels": labels,
        "prompts": prompts.sha256 if prompts else None,
        "device": torch.device(device).type,
    }
    work = Pass(label, settings.n, min(settings.batch, settings.n), make, [ActivationProbe(layers, settings)], identity)
    with meter(f"layers of {label}", work.n) as progress:
        columns = place.collect(work, progress)
    if worker()[0] != 0:
        return None
    total = sum(block.double().sum(0) for block in columns.blocks("activations"))
    assert isinstance(total, Tensor)
    values = (total / columns.n).reshape(len(layers), settings.steps)
    values = values.sqrt() if settings.stat == "rms" else values
    levels = (grid.sigma / grid.alpha)[:-1].tolist()
    return {
        **FORMAT,
        "d2o": __version__,
        "paper": PAPER,
        "name": label,
        "x": {
            "kind": "teacher",
            "source": source,
            "sha256": teacher.fingerprint,
            "parameters": count_parameters(teacher.network),
            "licence": spec.licence,
        },
        "settings": {
            "act_stat": settings.stat,
            "steps": settings.steps,
            "solver": settings.solver,
            "n": settings.n,
            "seeds": [settings.seed, settings.seed + settings.n - 1],
            "labels": labels,
            **({"prompts": len(prompts), "prompts_sha256": prompts.sha256} if prompts else {}),
        },
        "i": list(range(settings.steps, 0, -1)),
        "sigma": levels,
        "layers": [_layer(layer, row, levels) for layer, row in zip(layers, values.numpy(), strict=True)],
        "env": hardware(device),
    }


def _layer(layer: BlockLayer, values: np.ndarray, levels: Sequence[float]) -> JsonObject:
    """A layer's raw values over i = N, ..., 1, where the largest is, and all local maxima, the largest first."""
    from scipy.signal import find_peaks

    low, high = float(values.min()), float(values.max())
    scaled = min_max(values)
    places, _ = find_peaks(np.concatenate([[-1.0], scaled, [-1.0]]), prominence=PROMINENT)  # ends may be maxima, too
    order = sorted((int(place) - 1 for place in places), key=lambda at: -scaled[at])

    def point(at: int) -> JsonObject:
        return {"i": len(levels) - at, "sigma": levels[at], "height": float(scaled[at])}

    return {
        "name": layer.name,
        "part": layer.part,
        "depth": layer.depth,
        "peak": point(int(values.argmax())),
        "maxima": [point(at) for at in order],
        "min": low,
        "max": high,
        "values": [float(f"{value:.6g}") for value in values],
    }


def min_max(values: np.ndarray) -> np.ndarray:
    """(O_t - min) / (max - min) over the time steps of a layer; 0 where it is constant."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
