"""What is asked of every image of a pass: features, labels, scores with its prompt, distances to the image beside
it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from d2o.data.captions import NUMERALS
from d2o.evaluation.clip_scorer import ClipScore
from d2o.evaluation.collect import ImageBatch
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.pair_distances import PairDistance
from d2o.inputs import JsonObject


class FeatureProbe:
    """The wanted outputs of an extractor."""

    def __init__(self, extractor: Extractor, wanted: Sequence[str]):
        self.extractor, self.wanted = extractor, tuple(sorted(wanted))
        self.identity = {
            "extractor": extractor.name,
            "weights": extractor.sha256,
            "resize": extractor.resize,
            "outputs": self.wanted,
        }

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        return {
            f"{self.extractor.name}/{key}": value
            for key, value in self.extractor.outputs(batch.images, self.wanted).items()
        }


class LabelProbe:
    """The class asked for, -1 where there is none."""

    identity: JsonObject = {"labels": True}

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        labels = batch.labels if batch.labels is not None else torch.full((len(batch.images),), -1)
        return {"labels": labels.cpu().to(torch.int64)}


class PromptProbe:
    """The digit that each prompt names by a word ("seven") or numeral, as classes of the extractor `digits`; -1 where
    it names none, or several."""

    identity: JsonObject = {"prompts": "digits"}

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        assert batch.prompts is not None
        return {"prompt-class": torch.tensor([digit_in(prompt) for prompt in batch.prompts], dtype=torch.int64)}


def digit_in(prompt: str) -> int:
    words = set(re.findall(r"[a-z]+|\d+", prompt.lower()))
    named = {n for n, word in enumerate(NUMERALS[:10]) if words & {word, str(n)}}
    return named.pop() if len(named) == 1 else -1


class ClipProbe:
    """CLIP score of each image with its prompt."""

    def __init__(self, model: ClipScore):
        self.model = model
        self.identity = {"clip": model.name, "weights": model.sha256}

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        assert batch.prompts is not None
        return {"clip-score": self.model.score(batch.images, batch.prompts)}


class DistanceProbe:
    """Squared difference per pixel (values in [-1, 1], before they become 8 bits), and the distance of features of the
    8-bit images."""

    def __init__(self, extractor: Extractor):
        self.extractor = extractor
        self.identity = {"distance": extractor.name, "weights": extractor.sha256, "resize": extractor.resize}

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        other = batch.other
        assert other is not None and batch.floats is not None and other.floats is not None
        square = (batch.floats - other.floats).double().square().flatten(1).mean(1)
        ours, theirs = (self.extractor.features(b.images).double() for b in (batch, other))
        return {"pair/square": square, "pair/feature": (ours - theirs).norm(dim=1)}


class PairProbe:
    """A perceptual distance between an image (or latent) and the other of equal noise."""

    def __init__(self, key: str, distance: PairDistance):
        self.key, self.distance = key, distance
        self.identity = {"pair": distance.name, "weights": distance.sha256}

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        other = batch.other
        assert other is not None
        if self.distance.space == "latent":
            assert batch.latents is not None and other.latents is not None
            return {f"pair/{self.key}": self.distance(batch.latents.float(), other.latents.float())}
        return {f"pair/{self.key}": self.distance(batch.images, other.images)}


class DreamSimProbe:
    """DreamSim distance: each image is embedded once."""

    def __init__(self, extractor: Extractor):
        self.extractor = extractor
        self.identity = {"pair": "dreamsim", "weights": extractor.sha256}

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        from d2o.metrics.diversity import dreamsim_distance

        assert batch.other is not None
        return {
            "pair/dreamsim": dreamsim_distance(
                self.extractor.features(batch.images), self.extractor.features(batch.other.images)
            )
        }
