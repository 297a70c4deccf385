"""The score that training takes on the way: Fréchet distance, and accuracy where the classes are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.data_section import DataSection
from d2o.data.prompts import Prompts
from d2o.data.stored_latents import LatentSet, open_set
from d2o.errors import UserError
from d2o.evaluation.accuracy import accuracy
from d2o.evaluation.collect import silent
from d2o.evaluation.extractor import Device, Extractor, check_images_fit
from d2o.evaluation.named_extractors import load_extractor
from d2o.evaluation.paper_protocols import find_preset
from d2o.evaluation.passes import feature_probes, generator_pass
from d2o.evaluation.preset_check import hold_to
from d2o.evaluation.protocol import Settings
from d2o.evaluation.reference import Reference, generated_reference, load_reference, measure_reference
from d2o.evaluation.sides import Measured
from d2o.evaluation.subjects import Generator, Pictures, pictures
from d2o.evaluation.workplace import Workplace
from d2o.inputs import JsonObject
from d2o.runtime import worker
from d2o.teachers.base import Spec

IMAGES = ("labels", "quantize", "resize")
"""Settings of a protocol that say how images are made; their number and seeds are the caller's."""


@lru_cache(maxsize=4)
def cached(
    extractor: str, reference: str, device: str, protocol: str | None, data: DataSection | None = None
) -> tuple[Extractor, Reference]:
    network = load_extractor(extractor, device)
    resize = "none" if network.shape is None else "crop"  # those that take any size resize by themselves
    settings, outputs = Settings(**{"resize": resize, **images_of(protocol)}), {extractor: (network, {"features"})}
    if data is None:
        found = load_reference(reference, outputs, False, settings, device, main=network)
    else:
        found = generated_reference(data.path, training_images(data), outputs, settings)
    if protocol is not None:
        hold_to(find_preset(protocol), [network], found.name, found.n)
    if data is not None:  # after what could refuse it: all of its images are looked at
        found = measure_reference(found, outputs, settings, device, Workplace(memory=True), silent)
    return network, found


def training_images(data: DataSection) -> Pictures:
    """The images of a recipe's `data:` section as training reads them, but not mirrored. UserError: stored latents,
    which no network here takes."""
    found = open_set(
        data.path, resolution=data.resolution, channels=data.channels, on_bad=data.on_bad, limit=data.limit
    )
    if isinstance(found, LatentSet):
        raise UserError(
            f"eval.reference: {found.name} holds stored latents, and a Fréchet distance is between images",
            "name a reference",
        )
    return pictures(found, data.path)


def images_of(protocol: str | None) -> JsonObject:
    """What a protocol says of how images are made."""
    return (
        {}
        if protocol is None
        else {key: value for key, value in find_preset(protocol).settings.items() if key in IMAGES}
    )


class FrechetEvaluator:
    """A score taken again and again against one reference, which is loaded once. Deterministic; global random state is
    left alone.

    `protocol`: the preset that says how images are made and what network and reference have to be. `data`: a recipe's
    section, whose images are the reference instead. UserError: absent or other than these.
    """

    def __init__(
        self,
        extractor: str,
        reference: str,
        device: Device = "cpu",
        protocol: str | None = None,
        data: DataSection | None = None,
    ):
        self.device, self.settings = device, images_of(protocol)
        self.extractor, self.reference = cached(extractor, reference, str(device), protocol, data)

    def check(self, spec: Spec) -> None:
        """UserError unless the extractor takes the images of that spec."""
        if not spec.latent:  # decoded latents have another size; the extractor checks them
            check_images_fit(spec.shape, self.extractor, of="the student's images")

    def score(
        self,
        generate: Callable[[Tensor, Condition], Tensor],
        spec: Spec,
        *,
        n: int,
        seed: int,
        batch: int = 250,
        labels: str | None = None,
        place: Workplace | None = None,
        key: str = "",
        prompts: Prompts | None = None,
    ) -> dict[str, float]:
        """{"fd": float, and "accuracy": float where classes are known} of the images of seeds seed .. seed + n - 1.

        generate(noise [b, C, H, W], condition of b) -> decoded images [b, C, H, W] in [-1, 1], its networks
        in eval mode. `place` is where several processes, each with the same call, share the work, and `key` names the
        weights: the first one gets the score, the others {}. `prompts`: of a student that takes text, in turn.
        UserError: NaN or infinite values.
        """
        name = "the student"
        about = {"sha256": key}
        x = Generator(name, name, "student", spec, generate, lambda images: images, None, about, prompts=prompts)
        wanted = (
            {"features", "logits"}
            if "logits" in self.extractor.has and self.extractor.shape is not None
            else {"features"}
        )
        made = {**self.settings, "labels": labels} if labels else self.settings
        settings = Settings(**{**made, "n": n, "seed": seed, "batch": batch})
        work = generator_pass(
            x, settings, 0, feature_probes({self.extractor.name: (self.extractor, wanted)}), self.device
        )
        run = Measured((place or Workplace(memory=True)).collect(work, lambda done: None))
        if place is not None and worker()[0] != 0:
            return {}
        with torch.inference_mode():
            ours, theirs = (side.statistics(self.extractor) for side in (run, self.reference.side))
        found = accuracy([run], x, self.extractor)
        return {"fd": ours.distance(theirs), **{key: entry["value"] for key, entry in found.items()}}
