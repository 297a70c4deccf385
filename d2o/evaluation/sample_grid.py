"""The small sample grids that a result carries, so that a report can be made later from results alone."""

from __future__ import annotations

import torch
from torch import Tensor

from d2o.data.images import to_uint8
from d2o.data.pictures import to_png
from d2o.evaluation.protocol import Settings, noise_for
from d2o.evaluation.subjects import Generator, Pictures
from d2o.inputs import JsonObject

MAX_SIDE = 1024  # pixels of a grid


def sample_grid(
    x: Generator | Pictures, teacher: Generator | None, settings: Settings, device: str | torch.device = "cpu"
) -> JsonObject:
    """Up to 8 x 8 images, not chosen: those of the first seeds (of a set: evenly spaced ones), ordered by label, as
    base64 PNG.

    `teacher_png` holds the teacher's images of the same noise and labels.
    """
    if isinstance(x, Pictures):
        columns = _columns(x.shape)
        picks = torch.linspace(0, x.n - 1, min(columns**2, x.n)).long().tolist()
        images, labels = x.batch(picks)
        order = _by_label(labels, len(images))
        return _record(images[order], labels, order, columns)
    columns = _columns(x.spec.shape) if not x.spec.latent else 2
    noise, condition = noise_for(
        x.spec, range(settings.seed, settings.seed + columns**2), settings.labels, prompts=x.prompts
    )
    labels = condition.labels
    order = _by_label(labels, len(noise))
    noise, given = noise[order].to(device), condition[order]
    record = _record(to_uint8(x.generate(noise, given)), labels, order, columns)
    record["seeds"] = [settings.seed, settings.seed + columns**2 - 1]
    if condition.prompts is not None:
        record["prompts"] = list(condition.prompts)
    if teacher is not None:
        record |= {"teacher_png": to_png(to_uint8(teacher.generate(noise, given)), columns), "teacher": teacher.name}
    return record


def _record(images: Tensor, labels: Tensor | None, order: Tensor, columns: int) -> JsonObject:
    return {
        "png": to_png(images, columns),
        "columns": columns,
        "n": len(images),
        "labels": None if labels is None else labels[order].tolist(),
    }


def _columns(shape: tuple[int, ...]) -> int:
    return max(2, min(8, MAX_SIDE // shape[-1]))


def _by_label(labels: Tensor | None, n: int) -> Tensor:
    return torch.arange(n) if labels is None else torch.argsort(labels, stable=True)
