"""The score that training takes on the way: Fréchet distance, and accuracy where the classes are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from d2o.metrics.accuracy import accuracy
from d2o.metrics.collect import Workplace
from d2o.metrics.features import Extractor, load_extractor
from d2o.metrics.passes import feature_probes, generator_pass
from d2o.metrics.protocol import Settings
from d2o.metrics.reference import Reference, load_reference
from d2o.metrics.sides import Measured
from d2o.metrics.subjects import Device, Generator
from d2o.teachers.base import Spec


@lru_cache(maxsize=4)
def cached(extractor: str, reference: str, device: str) -> tuple[Extractor, Reference]:
    network = load_extractor(extractor, device)
    settings = Settings(resize="crop")
    return network, load_reference(reference, {network.name: (network, {"features"})}, False, settings, device, main=network)


class FrechetEvaluator:
    """A score taken again and again against one reference, which is loaded once. Deterministic; global random state is left alone."""

    def __init__(self, extractor: str, reference: str, device: Device = "cpu"):
        self.device = device
        self.extractor, self.reference = cached(extractor, reference, str(device))

    def score(
        self, generate: Callable[[Tensor, Tensor | None], Tensor], spec: Spec, *, n: int, seed: int, batch: int = 250, labels: str | None = None
    ) -> dict[str, float]:
        """{"fd": float, and "accuracy": float where classes are known} of the images of seeds seed .. seed + n - 1.

        generate(noise [b, C, H, W], class indices [b] or None) -> decoded images [b, C, H, W] in [-1, 1], its networks in eval mode.
        UserError: NaN or infinite values.
        """
        x = Generator("the student", "the student", "student", spec, generate, lambda images: images, None, {})  # type: ignore[arg-type]
        wanted = {"features", "logits"} if "logits" in self.extractor.has and self.extractor.shape is not None else {"features"}
        settings = Settings(n=n, seed=seed, batch=batch, labels=labels)
        work = generator_pass(x, settings, 0, feature_probes({self.extractor.name: (self.extractor, wanted)}), self.device)
        run = Measured(Workplace(memory=True).collect(work, lambda done: None))
        with torch.inference_mode():
            ours, theirs = (side.statistics(self.extractor) for side in (run, self.reference.side))
        found = accuracy([run], x, self.extractor)
        return {"fd": ours.distance(theirs), **{key: entry["value"] for key, entry in found.items()}}


def quick_fd(
    generate: Callable[[Tensor, Tensor | None], Tensor], spec: Spec, extractor: str, reference: str, n: int = 1000, seed: int = 2_000_000,
    batch: int = 250, device: Device = "cpu",
) -> dict[str, float]:  # fmt: skip
    """The score of a student in training, as `FrechetEvaluator.score`; extractor and reference stay in memory between calls.
    Reference images of another size are scaled and centre-cropped, as training data are."""
    return FrechetEvaluator(extractor, reference, device).score(generate, spec, n=n, seed=seed, batch=batch)
