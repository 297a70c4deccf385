"""What X is compared with: statistics that are read, that ship with d2o, or that are computed from images or a generator."""

from __future__ import annotations

from dataclasses import dataclass, field

from d2o.errors import UserError
from d2o.metrics.features import Extractor
from d2o.metrics.protocol import Settings
from d2o.metrics.statistics import Statistics, load_statistics
from d2o.metrics.subjects import Device, Generator, Numbers, Pictures, Subject, check_subject, open_subject, reference_settings
from d2o.metrics.tally import Meter, silent, tally_generator, tally_pictures
from d2o.teachers.registry import asset

SHIPPED = {"real:digits": "reference_digits.npz"}
"""Reference -> statistics in d2o/assets (made by `d2o eval real:digits --save-stats`), used where their extractor has the same weights."""
OWN_IMAGES = {"digits": "real:digits"}
"""Teacher -> the images that it was trained on: what its distillates are compared with by default."""


@dataclass
class Reference:
    name: str
    kind: str  # images, pairs, statistics, student or teacher
    statistics: Statistics
    seeds: list[int] | None = None  # first and last, of a generated reference
    notes: list[str] = field(default_factory=list)


def default_reference(subject: Subject) -> str:
    """What to compare `subject` with when the user doesn't say. UserError where there is no such thing."""
    if subject.source.startswith("real:digits"):
        return "real:digits"
    if subject.teacher in OWN_IMAGES:
        return OWN_IMAGES[subject.teacher]
    raise UserError(
        f"what should {subject.source} be compared with? Give --against REF",
        "REF: images (folder, zip, tar, npz), statistics (.npz), a teacher or another checkpoint",
    )


def load_reference(
    text: str, extractor: Extractor | None, settings: Settings, device: Device = "cpu", on_bad: str = "refuse",
    meter: Meter = silent,
) -> Reference:  # fmt: skip
    """The statistics of REF. A generator as REF makes settings.n images from settings.seed on: from the same noise as X.

    `extractor` None: REF must be statistics. UserError: too few images, and what `open_subject` raises.
    """
    if extractor is not None and text in SHIPPED and asset(SHIPPED[text]).exists():
        shipped = load_statistics(asset(SHIPPED[text]))
        if shipped.weights_sha256 == extractor.sha256:
            return Reference(text, "images", shipped)
    subject = open_subject(text, reference_settings(settings), device, extractor, on_bad)
    if isinstance(subject, Numbers):
        return Reference(text, subject.kind, subject.statistics)
    if extractor is None:
        raise UserError(f"{text} holds images; to compare statistics with them name the --extractor that made the statistics")
    check_subject(subject, extractor)
    if isinstance(subject, Pictures):
        with meter(f"reference {text}", subject.n) as progress:
            tally = tally_pictures(subject, extractor, settings.batch, progress)
        return Reference(text, subject.kind, Statistics.of(tally.features, extractor, subject.resize), notes=subject.notes)
    return _generated(subject, extractor, settings, device, meter)


def _generated(subject: Generator, extractor: Extractor, settings: Settings, device: Device, meter: Meter) -> Reference:
    seeds = range(settings.seed, settings.seed + settings.n)
    with meter(f"reference {subject.name}", settings.n) as progress:
        tally = tally_generator(
            subject.generate, subject.spec, extractor, seeds, batch=settings.batch, labels=settings.labels, who=subject.name,
            device=device, progress=progress,
        )  # fmt: skip
    name = subject.name if subject.kind == "teacher" else subject.source
    return Reference(name, subject.kind, Statistics.of(tally.features, extractor), [seeds[0], seeds[-1]])
