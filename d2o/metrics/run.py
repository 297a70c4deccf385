"""`d2o eval X [X ...] --against REF` without the command line: choose extractor, reference and teacher, then measure each X."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from d2o.errors import UserError
from d2o.metrics.evaluate import Evaluation, evaluate_one
from d2o.metrics.features import EXTRACTORS, Extractor, default_extractor, load_extractor
from d2o.metrics.protocol import Settings
from d2o.metrics.reference import Reference, default_reference, load_reference
from d2o.metrics.subjects import Device, Generator, Numbers, Subject, open_subject, reference_teacher
from d2o.metrics.tally import Meter, silent


@dataclass(frozen=True)
class Request:
    """What the user asked for. None: the default that fits X."""

    xs: Sequence[str]
    against: str | None = None
    extractor: str | None = None
    teacher: str | None = None
    teacher_distance: bool = True
    names: Sequence[str] = ()
    reference_needed: bool = True
    on_bad: str = "refuse"
    grid: bool = True
    device: Device = "cpu"


def evaluate_all(request: Request, settings: Settings, meter: Meter = silent) -> Iterator[Evaluation]:
    """One evaluation for each X, in order, each as soon as it is done. UserError as `evaluate_one`, and for a wrong number of names."""
    if request.names and len(request.names) != len(request.xs):
        raise UserError(f"{len(request.names)} --name for {len(request.xs)} X", "give one --name for each X, in their order, or none")
    if settings.resize != "none" and request.extractor is None:
        raise UserError("--resize crop needs --extractor: it gives the size")
    extractor = load_extractor(request.extractor, request.device) if request.extractor else None
    references: dict[str, Reference] = {}
    for i, text in enumerate(request.xs):
        x = open_subject(text, settings, request.device, extractor, request.on_bad)
        extractor = extractor or _default(x, request.device)
        reference = None
        if request.against or request.reference_needed:
            ref = request.against or default_reference(x)
            if ref not in references:
                references[ref] = load_reference(ref, extractor, settings, request.device, request.on_bad, meter)
            reference = references[ref]
        teacher, notes = reference_teacher(x, request.teacher, settings.cfg, request.device) if request.teacher_distance else (None, [])
        result = evaluate_one(
            x, reference, extractor, settings, teacher=teacher, name=request.names[i] if request.names else None, device=request.device,
            grid=request.grid, notes=tuple(notes), meter=meter,
        )  # fmt: skip
        result.record["command"] = command(request, settings, text, reference)
        yield result


def _default(x: Subject, device: Device) -> Extractor | None:
    """The extractor for x when none is named; None for statistics that don't say which made them."""
    if isinstance(x, Numbers):
        return load_extractor(x.statistics.feature, device) if x.statistics.feature in EXTRACTORS else None
    if isinstance(x, Generator) and x.spec.space != "pixel":
        raise UserError(f"no default feature extractor for {x.source}, which works in latents; name one with --extractor")
    return load_extractor(default_extractor(tuple(x.shape)), device)


def command(request: Request, settings: Settings, x: str, reference: Reference | None) -> str:
    """The command line that measures `x` again."""
    words = ["d2o", "eval", x]
    against = request.against or (reference.name if reference else None)
    given = {"against": against, "extractor": request.extractor, "teacher": request.teacher}
    words += [word for key, value in given.items() if value for word in (f"--{key}", value)]
    if not request.teacher_distance:
        words.append("--no-teacher-distance")
    defaults = asdict(Settings())
    for key, value in asdict(settings).items():
        if value != defaults[key]:
            words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)
