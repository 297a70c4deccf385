"""What X is compared with: statistics that are read, that ship with d2o, or that are computed from images or a
generator."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from d2o.errors import UserError
from d2o.evaluation.collect import OpenMeter, silent
from d2o.evaluation.comparison_teacher import reference_settings
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.named_references import REFERENCES, find_reference, is_named, load_reference_statistics
from d2o.evaluation.passes import Outputs, feature_probes, generator_pass, pictures_pass
from d2o.evaluation.protocol import Settings
from d2o.evaluation.sides import Batchwise, Given, Measured, Side
from d2o.evaluation.statistics import Statistics
from d2o.evaluation.statistics_files import holds_statistics, load_statistics
from d2o.evaluation.subjects import (
    Device,
    Generator,
    Numbers,
    Pictures,
    Subject,
    check_subject,
    check_there,
    open_subject,
)
from d2o.evaluation.workplace import Workplace
from d2o.interop.assets import asset

SHIPPED = {"real:digits": "reference_digits.npz"}
"""Reference -> statistics in d2o/assets (made by `d2o eval real:digits --save-stats`), used where their extractor has
the same weights."""
OWN_IMAGES = {"digits": "real:digits", "cifar16": "d2o-cifar10-16"}
"""Teacher -> the images that it was trained on: what its distillates are compared with by default."""


@dataclass
class Reference:
    """`subject`: what it was opened as; its images can be shown where it holds any. `measured` None: opened, and not
    measured yet."""

    name: str
    kind: str  # images, pairs, statistics, student or teacher
    measured: Side | None
    subject: Subject | None = None
    seeds: list[int] | None = None  # first and last, of a generated reference
    resize: str = "none"
    notes: list[str] = field(default_factory=list)
    images: int | None = None  # how many it has, where it is not measured yet
    given: Given | None = None  # statistics that a file of images holds besides

    @property
    def side(self) -> Side:
        assert self.measured is not None, f"{self.name} is not measured yet"
        return self.measured

    @property
    def n(self) -> int | None:
        return self.images if self.measured is None else self.measured.n


def default_reference(subject: Subject) -> str:
    """What to compare `subject` with when the user doesn't say. UserError where there is no such thing."""
    if subject.source.startswith("real:digits"):
        return "real:digits"
    if subject.teacher in OWN_IMAGES:
        return OWN_IMAGES[subject.teacher]
    raise UserError(
        f"what should {subject.source} be compared with? Give --against REF",
        "REF: images (folder, zip, tar, npz), statistics (.npz, .pkl), a published reference"
        f" ({', '.join(sorted(REFERENCES))}), a teacher or another checkpoint",
    )


def load_reference(
    text: str,
    outputs: Outputs,
    rows: bool,
    settings: Settings,
    device: Device = "cpu",
    on_bad: str = "refuse",
    place: Workplace | None = None,
    meter: OpenMeter = silent,
    main: Extractor | None = None,
) -> Reference:
    """REF, with the `outputs` that are needed of it; `rows`: of every image, else statistics are enough. A generator as
    REF makes settings.n
    images from settings.seed on: from the same noise as X. `main`: the extractor for whose size --resize crop cuts.

    UserError: too few images, and what `open_subject` raises.
    """
    reference = open_reference(text, outputs, rows, settings, device, on_bad, main)
    return measure_reference(reference, outputs, settings, device, place or Workplace(memory=True), meter)


def open_reference(
    text: str,
    outputs: Outputs,
    rows: bool,
    settings: Settings,
    device: Device = "cpu",
    on_bad: str = "refuse",
    main: Extractor | None = None,
) -> Reference:
    """The same without measuring any image: all that can be refused is refused here."""
    extractors = [extractor for extractor, _ in outputs.values()]
    if (
        (shipped := _shipped(text, extractors)) is not None
        and not rows
        and not any("spatial" in wanted for _, wanted in outputs.values())
    ):
        return Reference(text, "images", Given(text, lambda name: shipped))
    named = is_named(text) and not os.path.exists(text)
    path = str(find_reference(text)) if named else text
    check_there(path, REFERENCES)
    given: Given | None = None
    if named or holds_statistics(path):
        given = Given(
            text, lambda name: load_reference_statistics(text, name) if named else load_statistics(path, name)
        )
    subject = open_subject(path, reference_settings(settings), device, main, on_bad)
    if isinstance(subject, Numbers):
        return Reference(text, subject.kind, given or Given(text, subject.read), subject)
    if not extractors:
        raise UserError(
            f"{text} holds images; to compare statistics with them name the --extractor that made the statistics"
        )
    if given is not None and not rows and all(extractor.name == "inception" for extractor in extractors):
        return Reference(text, subject.kind, given, subject)
    return replace(generated_reference(text, subject, outputs, settings), given=given)


def generated_reference(text: str, subject: Generator | Pictures, outputs: Outputs, settings: Settings) -> Reference:
    """The reference that these images are, not measured yet. UserError: too few, or of a shape that an extractor
    doesn't take."""
    for extractor, _ in outputs.values():
        check_subject(subject, extractor)
    if isinstance(subject, Pictures):
        check_enough(subject)
        return Reference(text, subject.kind, None, subject, None, subject.resize, subject.notes, subject.n)
    name, seeds = (
        subject.name if subject.kind == "teacher" else subject.source,
        [settings.seed, settings.seed + settings.n - 1],
    )
    return Reference(
        name, subject.kind, None, subject, seeds, settings.preparation.describe(), subject.notes, settings.n
    )


def measure_reference(
    reference: Reference, outputs: Outputs, settings: Settings, device: Device, place: Workplace, meter: OpenMeter
) -> Reference:
    """The reference with what is needed of its images; as it is where that is known."""
    subject = reference.subject
    if reference.measured is not None or not isinstance(subject, Generator | Pictures):
        return reference
    probes = feature_probes(outputs)
    work = (
        pictures_pass(subject, settings, probes)
        if isinstance(subject, Pictures)
        else generator_pass(subject, settings, 0, probes, device)
    )
    with meter(f"reference {subject.name if isinstance(subject, Generator) else reference.name}", work.n) as progress:
        columns = place.collect(work, progress)
    given, resize = reference.given, reference.resize
    return replace(
        reference, measured=Batchwise(columns, resize, given) if given is not None else Measured(columns, resize)
    )


def check_enough(pictures: Pictures) -> None:
    """UserError for fewer than two images."""
    if pictures.n < 2:
        raise UserError(
            f"{pictures.source} holds {pictures.n} image{'s' * (pictures.n != 1)}; a Fréchet distance needs at least 2"
        )


def _shipped(text: str, extractors: list[Extractor]) -> Statistics | None:
    if text not in SHIPPED or len(extractors) != 1 or not asset(SHIPPED[text]).exists():
        return None
    shipped = load_statistics(asset(SHIPPED[text]))
    return shipped if shipped.weights_sha256 == extractors[0].sha256 else None
