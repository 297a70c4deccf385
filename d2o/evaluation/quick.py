"""The scores that training takes on the way: Fréchet distance, accuracy where the classes are known, and what else was
asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from d2o.condition import Condition, Generate
from d2o.data.data_section import DataSection
from d2o.data.prompts import Prompts
from d2o.data.stored_latents import LatentSet, open_set
from d2o.errors import UserError
from d2o.evaluation.checks import check_task
from d2o.evaluation.collect import silent
from d2o.evaluation.evaluate import evaluate_one
from d2o.evaluation.extractor import Device, check_images_fit
from d2o.evaluation.known_metrics import Want, parse_metrics
from d2o.evaluation.named_extractors import load_extractor
from d2o.evaluation.paper_protocols import find_preset
from d2o.evaluation.preset_check import hold_to
from d2o.evaluation.protocol import Settings
from d2o.evaluation.reference import Reference, generated_reference, load_reference, measure_reference
from d2o.evaluation.subjects import Generator, Pictures, pictures
from d2o.evaluation.task import Task, reference_outputs
from d2o.evaluation.tools import Tools
from d2o.evaluation.workplace import Workplace
from d2o.inputs import JsonObject
from d2o.teachers.base import Spec

IMAGES = ("labels", "quantize", "resize")
"""Settings of a protocol that say how images are made; their number and seeds are the caller's."""


ON_THE_WAY = ("statistics", "rows", "")
"""What metrics that are measured on the way may need of the reference."""


def wants_of(also: Sequence[str]) -> list[Want]:
    """The metrics of `eval.also`. UserError: one that is unknown, or that needs more than a student's images."""
    wants = parse_metrics(also)
    for want in wants:
        if want.metric.reference not in ON_THE_WAY or not want.metric.output:
            raise UserError(
                f"metric {want.metric.name} needs more than the student's images; it is not measured on the way",
                "measure it of the finished run: d2o eval RUN --metrics " + want.metric.name,
            )
    return wants


@lru_cache(maxsize=4)
def cached(
    extractor: str,
    reference: str,
    device: str,
    protocol: str | None,
    data: DataSection | None = None,
    also: tuple[str, ...] = (),
) -> tuple[Task, Reference]:
    """What is measured, its networks loaded, and the reference."""
    network = load_extractor(extractor, device)
    resize = "none" if network.shape is None else "crop"  # those that take any size resize by themselves
    settings = Settings(**{"resize": resize, **images_of(protocol)})
    task = Task([*parse_metrics(["fd"]), *wants_of(also)], network, Tools(device=device), grid=False, distance=False)
    outputs, rows = reference_outputs(task)
    if data is None:
        found = load_reference(reference, outputs, rows, settings, device, main=network)
    else:
        found = generated_reference(data.path, training_images(data), outputs, settings)
    if protocol is not None:
        hold_to(find_preset(protocol), [network], found.name, found.n)
    if data is not None:  # after what could refuse it: all of its images are looked at
        found = measure_reference(found, outputs, settings, device, Workplace(memory=True), silent)
    return task, found


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


def unmade(noise: Tensor, condition: Condition) -> Tensor:
    raise AssertionError("nothing is made for a check")


class Evaluator:
    """Scores taken again and again against one reference, which is loaded once. Deterministic; global random state is
    left alone.

    `protocol`: the preset that says how images are made and what network and reference have to be. `data`: a recipe's
    section, whose images are the reference instead. `also`: metrics beside the Fréchet distance, by the names that
    `d2o eval --metrics` takes. UserError: absent or other than these.
    """

    def __init__(
        self,
        extractor: str,
        reference: str,
        device: Device = "cpu",
        protocol: str | None = None,
        data: DataSection | None = None,
        also: Sequence[str] = (),
    ):
        self.device, self.settings = device, images_of(protocol)
        self.task, self.reference = cached(extractor, reference, str(device), protocol, data, tuple(also))

    def check(self, spec: Spec, n: int, prompts: Prompts | None = None) -> None:
        """UserError unless these metrics can be had of n images of that spec, which need not be there yet."""
        for extractor, wanted in self.task.outputs().values():
            extractor.check_has(wanted)
            if not spec.latent:  # decoded latents have another size; the extractor checks them
                check_images_fit(spec.shape, extractor, of="the student's images")
        check_task(self.subject(unmade, spec, prompts=prompts), self.reference, self.task, self.how(n))

    def subject(self, generate: Generate, spec: Spec, key: str = "", prompts: Prompts | None = None) -> Generator:
        name = "the student"
        return Generator(
            name, name, "student", spec, generate, lambda images: images, None, {"sha256": key}, prompts=prompts
        )

    def how(self, n: int, **more: object) -> Settings:
        return Settings(**{**self.settings, **more, "n": n})

    def score(
        self,
        generate: Generate,
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
        """{"fd": float, "accuracy": float where classes are known, and a float for each key of the other metrics} of
        the images of seeds seed .. seed + n - 1.

        generate(noise [b, C, H, W], condition of b) -> decoded images [b, C, H, W] in [-1, 1], its networks
        in eval mode. `place` is where several processes, each with the same call, share the work, and `key` names the
        weights: the first one gets the scores, the others {}. `prompts`: of a student that takes text, in turn.
        UserError: NaN or infinite values.
        """
        settings = self.how(n, seed=seed, batch=batch, **({"labels": labels} if labels else {}))
        x = self.subject(generate, spec, key, prompts)
        found = evaluate_one(x, self.reference, self.task, settings, device=self.device, place=place)
        if found is None:
            return {}
        return {key: entry["value"] for key, entry in found.record["metrics"].items() if "value" in entry}
