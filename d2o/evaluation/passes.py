"""The passes of an evaluation: which images, and what is asked of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from d2o.evaluation.collect import ImageBatch, Pass, Probe, check_images, clock
from d2o.evaluation.extractor import Device, Extractor
from d2o.evaluation.prepare import quantize
from d2o.evaluation.probes import FeatureProbe, LabelProbe
from d2o.evaluation.protocol import Settings, noise_for
from d2o.evaluation.subjects import Generator, Pictures
from d2o.inputs import JsonObject

Outputs = dict[str, tuple[Extractor, set[str]]]
"""Extractor's name -> what is wanted of it."""


def feature_probes(outputs: Outputs) -> list[Probe]:
    return [FeatureProbe(extractor, sorted(wanted)) for extractor, wanted in outputs.values() if wanted]


def generator_pass(
    x: Generator,
    settings: Settings,
    run: int,
    probes: Sequence[Probe],
    device: Device,
    per_prompt: int = 1,
    n: int | None = None,
) -> Pass:
    """The images of run number `run`: seeds from settings.seed + run * n on."""
    n = settings.n if n is None else n
    first = settings.seed + run * n
    extra = [LabelProbe()] if x.spec.condition == "label" else []

    def make(numbers: range) -> ImageBatch:
        return generate(
            x, settings, range(first + numbers.start, first + numbers.stop), device, settings.seed, per_prompt
        )

    return Pass(
        x.name,
        n,
        min(settings.batch, n),
        make,
        [*extra, *probes],
        generator_identity(x, settings, first, per_prompt, device),
    )


def generate(
    x: Generator, settings: Settings, seeds: range, device: Device, first_seed: int, per_prompt: int = 1
) -> ImageBatch:
    """The images of these seeds as they are scored. UserError: NaN or infinite values."""
    noise, condition = noise_for(x.spec, seeds, settings.labels, first_seed, x.prompts, per_prompt)
    noise = noise.to(device)
    start = clock(device)
    with torch.inference_mode():
        made = x.sample(noise, condition)
        floats = x.decode(made)
    seconds = clock(device) - start
    check_images(floats, seeds, x.name)
    images = settings.preparation.apply(quantize(floats, settings.quantize))
    prompts = None if condition.prompts is None else list(condition.prompts)
    latents = made if x.spec.latent else None
    return ImageBatch(images, condition.labels, prompts, floats, latents, seconds=seconds)


def pair_pass(x: Generator, teacher: Generator, settings: Settings, probes: Sequence[Probe], device: Device) -> Pass:
    """Images of equal noise and condition, `x`'s beside the teacher's: seeds from settings.seed on."""

    def make(numbers: range) -> ImageBatch:
        seeds = range(settings.seed + numbers.start, settings.seed + numbers.stop)
        batch = generate(x, settings, seeds, device, settings.seed)
        batch.other = generate(teacher, settings, seeds, device, settings.seed)
        batch.seconds = batch.other.seconds  # the teacher's speed is told beside the distance
        return batch

    n = settings.distance_n
    identity = {
        name: generator_identity(g, settings, settings.seed, 1, device) for name, g in (("x", x), ("teacher", teacher))
    }
    return Pass(f"{x.name} beside {teacher.name}", n, min(settings.batch, n), make, probes, identity)


def pictures_pass(x: Pictures, settings: Settings, probes: Sequence[Probe]) -> Pass:
    """All images of a set, in its order."""

    def make(numbers: range) -> ImageBatch:
        images, labels = x.batch(numbers)
        return ImageBatch(images, labels, x.captions(numbers) if x.captions else None)

    identity = {"kind": x.kind, "source": x.source, "resize": x.resize, **x.record}
    return Pass(x.name, x.n, min(settings.batch, x.n), make, [LabelProbe(), *probes], identity)


def generator_identity(x: Generator, settings: Settings, first: int, per_prompt: int, device: Device) -> JsonObject:
    """What the images of `x` depend on."""
    keys = ("sha256", "solver", "steps", "cfg")
    return {
        **{key: x.record.get(key) for key in keys},
        "kind": x.kind,
        "seed": first,
        "first": settings.seed,
        "labels": settings.labels,
        "prompts": x.prompts.sha256 if x.prompts else None,
        "per_prompt": per_prompt,
        "quantize": settings.quantize,
        "resize": settings.resize,
        "device": torch.device(device).type,
    }
