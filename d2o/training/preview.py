"""Sample grids during training: the same noises every time, the reference beside the product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from d2o.condition import Condition, Generate
from d2o.data.images import ImageSet, to_uint8
from d2o.data.pictures import draw_sheet, lay_out
from d2o.diffusion.guidance import Range
from d2o.diffusion.noise import noise_and_labels
from d2o.diffusion.solvers import Solver
from d2o.interop.safetensors_io import atomic_path
from d2o.teachers.base import Spec, Teacher

PREVIEW_SEED = 3_000_000  # away from the seeds of pairs (from 0) and of metrics


class Preview:
    """Left: the teacher's samples from these noises by `solver`, guided by `cfg` (or real images where there is no
    teacher); right: the product's, which is told the guidance scale where `cfg` is a range: from its low end to its
    high end among the samples of each class or prompt. `prompts`: what samples of prompts are asked for, again and
    again."""

    def __init__(
        self,
        folder: Path,
        spec: Spec,
        count: int,
        teacher: Teacher | None,
        images: ImageSet | None,
        solver: Solver | None,
        device: torch.device,
        prompts: Sequence[str] | None = None,
        cfg: float | Range = 1.0,
    ):
        self.folder = folder
        if spec.classes:
            count = max(
                count // spec.classes * spec.classes, min(count, spec.classes)
            )  # as many of each class, if there is room for all
        noise, labels = noise_and_labels(range(PREVIEW_SEED, PREVIEW_SEED + count), spec.shape, spec.classes)
        if spec.classes:
            labels = (torch.arange(count) * spec.classes) // max(count, 1)  # class by class, so that the rows read well
        condition = Condition.of_labels(labels) if spec.classes else Condition.none(count)
        asked = labels.tolist() if spec.classes else [0] * count
        self.layout = lay_out(count, asked if spec.classes else None)
        if prompts:
            asked = [i % len(prompts) for i in range(count)]
            condition = Condition.of_prompts([prompts[i] for i in asked])
            self.layout = lay_out(count, asked, dict(enumerate(prompts)))
        scale: float | Tensor = scales_between(cfg, asked).to(device) if isinstance(cfg, tuple) else cfg
        condition = condition.guided(scale if isinstance(scale, Tensor) else None)
        self.noise, self.condition = noise.to(device), condition.to(device)
        self.left: tuple[str, Tensor] | None = None
        self.who = "network" if teacher is None else "student"
        between = f", guidance {cfg[0]:g} to {cfg[1]:g}" if isinstance(cfg, tuple) else ""
        if teacher is not None and solver is not None:
            self.left = (
                f"teacher, {solver.steps} steps of {solver.name}{between}",
                to_uint8(teacher.decode(teacher.sample(self.noise, self.condition, solver, cfg=scale))).cpu(),
            )
        elif images is not None:
            self.left = "real images", images.images(_matching(images, condition.labels, count)).cpu()

    def write(self, images_seen: int, generate: Generate) -> Path:
        """previews/<images seen>.png; returns its path."""
        right = f"{self.who} after {images_seen:,} images", to_uint8(generate(self.noise, self.condition)).cpu()
        path = self.folder / f"{images_seen:09d}.png"
        with atomic_path(path) as temporary:
            draw_sheet([self.left, right] if self.left is not None else [right], self.layout).save(
                temporary, format="PNG"
            )
        return path


def scales_between(scales: Range, kinds: Sequence[int]) -> Tensor:
    """A guidance scale for each sample, [n] float32: from one end of the range to the other among those of a kind, or
    among all where there is one of each."""
    if len(set(kinds)) == len(kinds):
        kinds = [0] * len(kinds)
    low, high = scales
    total, seen = Counter(kinds), Counter[int]()
    found = []
    for kind in kinds:
        found.append(low + (high - low) * seen[kind] / max(total[kind] - 1, 1))
        seen[kind] += 1
    return torch.tensor(found, dtype=torch.float32)


def _matching(images: ImageSet, labels: Tensor | None, count: int) -> Tensor:
    """Indices of real images of these classes, in this order; any images where there are no classes."""
    if labels is None or images.labels is None:
        return torch.arange(count) % len(images)
    places = {c: (images.labels == c).nonzero()[:, 0] for c in labels.unique().tolist()}
    seen = dict.fromkeys(places, 0)
    chosen = []
    for c in labels.tolist():
        chosen.append(places[c][seen[c] % len(places[c])] if len(places[c]) else torch.tensor(0))
        seen[c] += 1
    return torch.stack(chosen)
