"""`d2o eval X [X ...] --against REF` without the command line: choose metrics, extractors, reference and teacher, then
measure each X."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from d2o.data.triplets import TripletSet
from d2o.errors import UserError
from d2o.evaluation.checks import check_task
from d2o.evaluation.collect import OpenMeter, silent
from d2o.evaluation.comparison_teacher import reference_teacher, same_task
from d2o.evaluation.evaluate import FORMAT, Evaluation, evaluate_one
from d2o.evaluation.extractor import Extractor
from d2o.evaluation.judges import is_judge, open_judge
from d2o.evaluation.judging import Judging, judge, prepare_judging
from d2o.evaluation.known_metrics import Want, parse_metrics
from d2o.evaluation.named_extractors import EXTRACTORS, default_extractor
from d2o.evaluation.preset_check import check_result, hold_to, refuse
from d2o.evaluation.presets import Preset
from d2o.evaluation.protocol import Settings
from d2o.evaluation.reference import Reference, check_enough, default_reference, measure_reference, open_reference
from d2o.evaluation.request import Request, command
from d2o.evaluation.subjects import (
    Generator,
    Numbers,
    Pictures,
    Subject,
    check_there,
    open_subject,
)
from d2o.evaluation.task import Task, reference_outputs
from d2o.evaluation.tools import Tools
from d2o.evaluation.workplace import Workplace
from d2o.runtime import StopFlag, Stopped


@dataclass
class _Ready:
    """One X with all that it is measured with, checked. `reference`: its name among the opened ones."""

    x: Subject
    plan: Task
    reference: str | None


def evaluate_all(
    request: Request,
    settings: Settings,
    meter: OpenMeter = silent,
    stop: StopFlag | None = None,
    place: Workplace | None = None,
) -> Iterator[Evaluation]:
    """One evaluation for each X, in order, each as soon as it is done; all are checked before the first image is
    measured. `place`: where passes are kept, by its owner.

    UserError as `evaluate_one`, for a wrong number of names, and for --steps of a single X that takes none. Stopped:
    how far it was.
    """
    if request.names and len(request.names) != len(request.xs):
        raise UserError(
            f"{len(request.names)} --name for {len(request.xs)} X",
            "give one --name for each X, in their order, or none",
        )
    many, references = len(request.xs), dict[str, Reference]()
    ready = _Preparing(request, settings, references)
    kept = []
    for text in request.xs:
        with _about(text, many):
            found = ready(text)
        kept.append(
            found if many == 1 or isinstance(found.x, Pictures | Numbers) else None
        )  # networks of several X one after another
    with nullcontext(place) if place is not None else Workplace(request.work, stop=stop) as place:
        for i, text in enumerate(request.xs):
            found = kept[i] or ready(text)
            try:
                result = _evaluate(i, found, request, settings, references, place, meter)
            except Stopped as stopped:
                if many == 1:
                    raise
                raise Stopped(f"{i} of {many} X measured; {stopped.message}", stopped.exit_code - 128) from stopped
            if result is not None:
                yield result


def _evaluate(
    i: int,
    ready: _Ready | Judging,
    request: Request,
    settings: Settings,
    references: dict[str, Reference],
    place: Workplace,
    meter: OpenMeter,
) -> Evaluation | None:
    name, reference = request.names[i] if request.names else None, None
    if isinstance(ready, Judging):
        record = judge(ready, settings, name, request.device, place, meter)
        return None if record is None else _complete(i, Evaluation({**FORMAT, **record}, None), request, settings)
    if ready.reference is not None:
        outputs, _ = reference_outputs(ready.plan)
        reference = references[ready.reference] = measure_reference(
            references[ready.reference], outputs, settings, request.device, place, meter
        )
    result = evaluate_one(
        ready.x, reference, ready.plan, settings, name=name, device=request.device, place=place, meter=meter
    )
    return None if result is None else _complete(i, result, request, settings, reference)


def _complete(
    i: int, result: Evaluation, request: Request, settings: Settings, reference: Reference | None = None
) -> Evaluation:
    """With what the request says beyond the measurement. UserError: it was not by the protocol after all."""
    if request.preset is not None:
        refuse(request.preset, check_result(request.preset, result.record["protocol"]))
        result.record["preset"] = {
            "name": request.preset.name,
            "paper": request.preset.paper,
            "tool": request.preset.tool,
        }
        result.record["notes"] += [note for note in request.preset.notes if note not in result.record["notes"]]
    if request.paper and request.paper[i]:
        result.record["paper"] = dict(request.paper[i])
    result.record["command"] = command(request, settings, request.xs[i], reference)
    return result


class _Preparing:
    """Opens one X after another and refuses what cannot be measured. References are opened once, into `references`."""

    def __init__(self, request: Request, settings: Settings, references: dict[str, Reference]):
        self.request, self.settings, self.references = request, settings, references
        for text in request.xs:
            if not is_judge(text):
                check_there(text)
        self.asked = self.wants = parse_metrics(request.metrics or ["fd"])
        self.tools, self.triplets = Tools(request.weights, request.device), dict[tuple[str, int], TripletSet]()
        self.main = self.tools.extractor(request.extractor) if request.extractor else None
        if settings.resize == "crop" and self.main is None:
            raise UserError("--resize crop needs --extractor: it gives the size")
        if not request.reference_needed and request.against is None:
            self.wants = [want for want in self.wants if want.metric.reference not in ("statistics", "rows")]

    def __call__(self, text: str) -> _Ready | Judging:
        request, settings = self.request, self.settings
        if is_judge(text):
            return prepare_judging(
                open_judge(text, self.tools, request.device),
                request.metrics,
                request.against,
                settings,
                request.on_bad,
                self.triplets,
            )
        x = open_subject(text, settings, request.device, self.main, request.on_bad)
        if isinstance(x, Pictures):
            check_enough(x)
        self.main = self.main or _main(x, self.asked, self.tools)
        teacher: Generator | None = None
        notes: list[str] = []
        needed = any(want.needs_teacher for want in self.wants)
        paired = True
        if request.teacher_distance or needed:
            unpaired = settings.own_teacher_images and not any(want.metric.reference == "pair" for want in self.wants)
            teacher, notes = reference_teacher(x, request.teacher, settings, request.device, needed, unpaired)
            if teacher is not None and isinstance(x, Generator) and not (paired := same_task(teacher, x)):
                notes.append(f"no images of the same noise and condition: {text} and {teacher.source} take others")
        if (
            settings.steps is not None
            and request.preset is None
            and not (isinstance(x, Generator) and "steps" in x.record)
        ):
            if request.steps_typed and len(request.xs) == 1:
                raise UserError(
                    f"--steps: {text} is neither a teacher nor a student that takes several steps", "leave it away"
                )
            notes.append(f"--steps is not for {text}")
        asked = settings.teacher_solver or settings.teacher_steps or settings.own_teacher_images
        if asked and teacher is None and request.against is None:
            notes.append(f"--teacher-... options are not for {text}: it is measured against no teacher")
        told = isinstance(x, Generator) and "cfg" in x.record
        if request.cfg_typed and teacher is None and not told and len(request.xs) == 1:
            raise UserError(
                f"--cfg: {text} is neither a teacher nor a student that is told a guidance scale, and is measured"
                " against none",
                "leave it away",
            )
        plan = Task(
            self.wants,
            self.main,
            self.tools,
            teacher,
            paired,
            request.teacher_distance and paired,
            request.latency,
            request.neighbours,
            request.grid,
            notes,
        )
        name = self._reference(x, plan)
        reference = self.references[name] if name is not None else None
        if request.preset is not None:
            _hold_to(request.preset, reference, plan)
        check_task(x, reference, plan, settings)
        return _Ready(x, plan, name)

    def _reference(self, x: Subject, plan: Task) -> str | None:
        """The name of what x is compared with, opened."""
        outputs, rows = reference_outputs(plan)
        if not plan.neighbours and not any(want.metric.reference in ("statistics", "rows") for want in plan.wants):
            return None
        request = self.request
        name = request.against or (request.preset.reference if request.preset else None) or default_reference(x)
        if name not in self.references:
            self.references[name] = open_reference(
                name, outputs, rows, self.settings, request.device, request.on_bad, plan.main
            )
        return name


@contextmanager
def _about(text: str, many: int) -> Iterator[None]:
    """Say which of several X a mistake is about."""
    try:
        yield
    except UserError as error:
        if many == 1 or text in error.message:
            raise
        raise UserError(f"{text}: {error.message}", error.hint) from error


def _main(x: Subject, wants: Sequence[Want], tools: Tools) -> Extractor | None:
    """The extractor for metrics that name none; where all name theirs, the first of these. None for statistics that
    don't say their own."""
    named = [want.extractor for want in wants if want.metric.output]
    if named and all(named):
        return tools.extractor(str(named[0]))
    if isinstance(x, Numbers):
        feature = x.statistics.feature
        return tools.extractor(feature) if feature in EXTRACTORS else None
    if isinstance(x, Generator) and x.spec.latent:
        if not any(want.metric.output and want.extractor is None for want in wants):
            return None
        raise UserError(
            f"no default feature extractor for {x.source}, which works in latents; name one with --extractor"
        )
    return tools.extractor(default_extractor(tuple(x.shape), x.teacher))


def _hold_to(preset: Preset, reference: Reference | None, plan: Task) -> None:
    """Refuse before hours of work what is known not to be the protocol."""
    extractors = {e.name: e for want in plan.wants if (e := plan.extractor(want)) is not None}
    hold_to(
        preset, list(extractors.values()), reference.name if reference else None, reference.n if reference else None
    )
