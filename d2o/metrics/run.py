"""`d2o eval X [X ...] --against REF` without the command line: choose metrics, extractors, reference and teacher, then measure each X."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from d2o.errors import UserError
from d2o.metrics.catalogue import Want, parse_metrics
from d2o.metrics.collect import Meter, Workplace, silent
from d2o.metrics.evaluate import Evaluation, evaluate_one
from d2o.metrics.extractor import Extractor
from d2o.metrics.features import EXTRACTORS, default_extractor
from d2o.metrics.plan import Plan, reference_outputs
from d2o.metrics.presets import Preset, check_result, hold_to, refuse
from d2o.metrics.protocol import Settings, option
from d2o.metrics.reference import Reference, check_enough, default_reference, load_reference
from d2o.metrics.subjects import Device, Generator, Numbers, Pictures, Subject, check_there, open_subject, reference_teacher
from d2o.metrics.tools import Tools
from d2o.runtime import StopFlag


@dataclass(frozen=True)
class Request:
    """What the user asked for. None: the default that fits X."""

    xs: Sequence[str]
    against: str | None = None
    metrics: Sequence[str] = ()
    extractor: str | None = None
    weights: Sequence[str] = ()
    teacher: str | None = None
    teacher_distance: bool = True
    names: Sequence[str] = ()
    reference_needed: bool = True
    on_bad: str = "refuse"
    grid: bool = True
    latency: bool = False
    neighbours: int = 0
    device: Device = "cpu"
    preset: Preset | None = None
    work: Path | None = None
    paper: Sequence[dict[str, float]] = field(default_factory=tuple)  # for each X: what a paper printed
    steps_typed: bool = False  # by the user, for this X: where it means nothing it is refused


def evaluate_all(
    request: Request, settings: Settings, meter: Meter = silent, stop: StopFlag | None = None, place: Workplace | None = None
) -> Iterator[Evaluation]:
    """One evaluation for each X, in order, each as soon as it is done. `place`: where passes are kept, for its owner to close.

    UserError as `evaluate_one`, for a wrong number of names, and for --steps of a single X that takes none.
    """
    if request.names and len(request.names) != len(request.xs):
        raise UserError(f"{len(request.names)} --name for {len(request.xs)} X", "give one --name for each X, in their order, or none")
    for text in request.xs:
        check_there(text)
    asked = wants = parse_metrics(request.metrics or ["fd"])
    tools = Tools(request.weights, request.device)
    main = tools.extractor(request.extractor) if request.extractor else None
    if settings.resize == "crop" and main is None:
        raise UserError("--resize crop needs --extractor: it gives the size")
    if not request.reference_needed and request.against is None:
        wants = [want for want in wants if want.metric.reference not in ("statistics", "rows")]
    own = place is None
    place = place or Workplace(request.work, stop=stop)
    references: dict[str, Reference] = {}
    for i, text in enumerate(request.xs):
        x = open_subject(text, settings, request.device, main, request.on_bad)
        if isinstance(x, Pictures):
            check_enough(x)
        main = main or _main(x, asked, tools)
        teacher: Generator | None = None
        notes: list[str] = []
        if request.teacher_distance or any(want.needs_teacher for want in wants):
            teacher, notes = reference_teacher(x, request.teacher, settings, request.device)
        if settings.steps is not None and request.preset is None and not (isinstance(x, Generator) and "steps" in x.record):
            if request.steps_typed and len(request.xs) == 1:
                raise UserError(f"--steps: {text} is neither a teacher nor a student that takes several steps", "leave it away")
            notes.append(f"--steps is not for {text}")
        plan = Plan(wants, main, tools, teacher, request.teacher_distance, request.latency, request.neighbours, request.grid, notes)
        reference = _reference(x, plan, request, settings, place, meter, references)
        if request.preset is not None:
            _hold_to(request.preset, reference, plan)
        result = evaluate_one(
            x, reference, plan, settings, name=request.names[i] if request.names else None, device=request.device, place=place, meter=meter
        )  # fmt: skip
        if result is None:
            continue
        if request.preset is not None:
            refuse(request.preset, check_result(request.preset, result.record["protocol"]))
            result.record["preset"] = {"name": request.preset.name, "paper": request.preset.paper, "tool": request.preset.tool}
            result.record["notes"] += [note for note in request.preset.notes if note not in result.record["notes"]]
        if request.paper and request.paper[i]:
            result.record["paper"] = dict(request.paper[i])
        result.record["command"] = command(request, settings, text, reference)
        yield result
    if own:
        place.close()


def _main(x: Subject, wants: Sequence[Want], tools: Tools) -> Extractor | None:
    """The extractor for metrics that name none; where all name theirs, the first of these. None for statistics that don't say their own."""
    named = [want.extractor for want in wants if want.metric.output]
    if named and all(named):
        return tools.extractor(str(named[0]))
    if isinstance(x, Numbers):
        feature = x.statistics.feature
        return tools.extractor(feature) if feature in EXTRACTORS else None
    if isinstance(x, Generator) and x.spec.space != "pixel":
        if not any(want.metric.output and want.extractor is None for want in wants):
            return None
        raise UserError(f"no default feature extractor for {x.source}, which works in latents; name one with --extractor")
    return tools.extractor(default_extractor(tuple(x.shape)))


def _reference(
    x: Subject, plan: Plan, request: Request, settings: Settings, place: Workplace, meter: Meter, known: dict[str, Reference]
) -> Reference | None:
    """What x is compared with; each is measured once."""
    outputs, rows = reference_outputs(plan)
    if not plan.neighbours and not any(want.metric.reference in ("statistics", "rows") for want in plan.wants):
        return None
    name = request.against or (request.preset.reference if request.preset else None) or default_reference(x)
    if name not in known:
        known[name] = load_reference(name, outputs, rows, settings, request.device, request.on_bad, place, meter, plan.main)
    return known[name]


def _hold_to(preset: Preset, reference: Reference | None, plan: Plan) -> None:
    """Refuse before hours of work what is known not to be the protocol."""
    extractors = {e.name: e for want in plan.wants if (e := plan.extractor(want)) is not None}
    hold_to(preset, list(extractors.values()), reference.name if reference else None, reference.n if reference else None)


def command(request: Request, settings: Settings, x: str, reference: Reference | None) -> str:
    """The command line that measures `x` again."""
    words = ["d2o", "eval", x]
    against = request.against or (reference.name if reference and not request.preset else None)
    given: dict[str, Any] = {"protocol": request.preset.name if request.preset else None, "against": against, "extractor": request.extractor,
                             "teacher": request.teacher, "metrics": None if request.preset else ",".join(request.metrics)}  # fmt: skip
    words += [word for key, value in given.items() if value for word in (f"--{key}", value)]
    words += [word for text in request.weights for word in ("--weights", text)]
    words += ["--no-teacher-distance"] * (not request.teacher_distance) + ["--latency"] * request.latency
    words += ["--neighbours", str(request.neighbours)] if request.neighbours else []
    defaults, fixed = asdict(Settings()), request.preset.settings if request.preset else {}
    for key, value in asdict(settings).items():
        if value != defaults[key] and key not in fixed:
            words += [option(key), str(value)]
    return shlex.join(words)
