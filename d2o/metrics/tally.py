"""One pass over images, generated or real: features, right answers, seconds. Images stream through; none are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2o.data.images import to_uint8
from d2o.errors import UserError
from d2o.metrics.features import Extractor
from d2o.metrics.frechet import FeatureStatistics
from d2o.metrics.protocol import noise_for
from d2o.metrics.subjects import Device, Generate, Pictures
from d2o.teachers.base import Spec

Progress = Callable[[int], None]
"""Called with the number of images just done."""
Meter = Callable[[str, int], AbstractContextManager[Progress]]
"""meter(what is being worked on, images in all) -> the progress of that work."""


@contextmanager
def silent(title: str, total: int) -> Iterator[Progress]:
    """The meter that shows nothing."""
    yield lambda done: None


@dataclass
class Tally:
    """Statistics of the features; images seen and recognised, per class of the extractor; seconds of each full batch generated."""

    features: FeatureStatistics
    right: Tensor
    seen: Tensor
    foreign: int = 0  # labels that the extractor doesn't know: then its answers say nothing
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, extractor: Extractor) -> Tally:
        right, seen = torch.zeros(2, extractor.classes, dtype=torch.int64)
        return cls(FeatureStatistics(extractor.dim), right, seen)

    @property
    def accuracy(self) -> float | None:
        """The share of images that the extractor takes for what their label says; None without labels that it knows."""
        return float(self.right.sum() / self.seen.sum()) if int(self.seen.sum()) and not self.foreign else None

    def update(self, images: Tensor, labels: Tensor | None, extractor: Extractor, classes: int | None) -> None:
        """Add uint8 images [k, C, H, W]. Labels (class indices, -1: none) of `classes` classes count if the extractor has as many classes;
        `classes` None means plain class numbers, of which a set may hold a few."""
        if labels is None or not extractor.classes or classes not in (None, extractor.classes):
            self.features.update(extractor.features(images))
            return
        features, logits = extractor.features_and_logits(images)
        self.features.update(features)
        labels, guess = labels.cpu(), logits.argmax(1).cpu()
        known = (labels >= 0) & (labels < extractor.classes)
        self.foreign += int((labels >= extractor.classes).sum())
        self.seen += torch.bincount(labels[known], minlength=extractor.classes)
        self.right += torch.bincount(labels[known & (labels == guess)], minlength=extractor.classes)


def tally_generator(
    generate: Generate, spec: Spec, extractor: Extractor, seeds: range, *, batch: int, labels: str | None = None,
    first_seed: int | None = None, who: str = "the student", device: Device = "cpu", progress: Progress = lambda done: None,
) -> Tally:  # fmt: skip
    """Generate and score the images of `seeds`; `first_seed` (default: the first of them) is image 0, from which labels count.

    UserError: NaN or infinite values, labels that `spec` doesn't have.
    """
    tally = Tally.empty(extractor)
    for part in blocks(seeds, batch):
        noise, classes = noise_for(spec, part, labels, seeds[0] if first_seed is None else first_seed)
        noise, classes = noise.to(device), None if classes is None else classes.to(device)
        start = _clock(device)
        images = generate(noise, classes)
        if len(part) == min(batch, len(seeds)):
            tally.seconds.append(_clock(device) - start)
        check_finite(images, part, who)
        tally.update(to_uint8(images), classes, extractor, spec.classes)
        progress(len(part))
    return tally


def tally_pictures(pictures: Pictures, extractor: Extractor, batch: int, progress: Progress = lambda done: None) -> Tally:
    """Score all images of a set. UserError for fewer than two."""
    if pictures.n < 2:
        raise UserError(f"{pictures.source} holds {pictures.n} image{'s' * (pictures.n != 1)}; a Fréchet distance needs at least 2")
    tally = Tally.empty(extractor)
    for part in blocks(range(pictures.n), batch):
        tally.update(*pictures.batch(part), extractor, pictures.classes)
        progress(len(part))
    return tally


def check_finite(images: Tensor, seeds: range, who: str) -> None:
    """UserError that counts the images with NaN or infinite values, as a collapsed student makes them."""
    bad = int((~torch.isfinite(images).flatten(1).all(1)).sum())
    if bad:
        raise UserError(
            f"{who}: {bad} of {len(seeds)} images (seeds {seeds[0]} to {seeds[-1]}) hold NaN or infinite values",
            "a collapsed student: take an earlier checkpoint, or train with a lower learning rate",
        )


def blocks(numbers: range, size: int) -> Iterator[range]:
    """`numbers` in pieces of `size`; the last may be smaller, none is dropped."""
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def _clock(device: Device) -> float:
    """Seconds, once everything asked of the device so far is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
