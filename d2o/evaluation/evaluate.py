"""Every metric that was asked for of one subject, with its protocol, as a JSON-able record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from d2o.evaluation.account import doubts, has, protocol_of
from d2o.evaluation.accuracy import accuracy
from d2o.evaluation.checks import check_task, told
from d2o.evaluation.collect import OpenMeter, Probe, silent
from d2o.evaluation.columns import Columns
from d2o.evaluation.comparison_teacher import described
from d2o.evaluation.extractor import Device
from d2o.evaluation.known_metrics import Want, combine
from d2o.evaluation.leaks import leak_notes
from d2o.evaluation.measures import Score, Sides
from d2o.evaluation.passes import feature_probes, generator_pass, pair_pass, pictures_pass
from d2o.evaluation.probes import ClipProbe, DistanceProbe, DreamSimProbe, PairProbe, PromptProbe
from d2o.evaluation.protocol import Settings, hardware
from d2o.evaluation.reference import Reference
from d2o.evaluation.sample_grid import sample_grid
from d2o.evaluation.sides import Given, Measured, Side
from d2o.evaluation.speed import latency, throughput
from d2o.evaluation.statistics import Statistics
from d2o.evaluation.subjects import Generator, Numbers, Pictures, Subject, check_subject
from d2o.evaluation.task import Task
from d2o.evaluation.workplace import Workplace
from d2o.inputs import JsonObject
from d2o.runtime import worker
from d2o.version import __version__

FORMAT = {"format": "d2o-eval", "version": 1}


@dataclass
class Evaluation:
    """`record` is the JSON result; `statistics` those of X's first run over the main extractor, where it has any."""

    record: JsonObject
    statistics: Statistics | None


def evaluate_one(
    x: Subject,
    reference: Reference | None,
    plan: Task,
    settings: Settings,
    *,
    name: str | None = None,
    device: Device = "cpu",
    place: Workplace | None = None,
    meter: OpenMeter = silent,
) -> Evaluation | None:
    """Measure `x`; None for a worker that is not the first, which only helps. Global random state is neither used nor
    changed.

    UserError: statistics of another extractor, images of another shape, too few, NaN or infinite values.
    """
    started = time.perf_counter()
    place = place or Workplace(memory=True)
    check_task(x, reference, plan, settings)
    runs = _main_passes(x, plan, settings, device, place, meter)
    taught = _teacher_passes(plan, settings, device, place, meter)
    diversity = _diversity_pass(x, plan, settings, device, place, meter)
    pairs = _pair_pass(x, plan, settings, device, place, meter)
    if worker()[0] != 0:
        return None
    metrics: JsonObject = {}
    for want in plan.wants:
        place.check_stop(f"{want.metric.name} of {x.name}")
        extractor, kind = plan.extractor(want), want.metric.reference
        sides = [diversity] if kind == "diversity" else [pairs] if kind == "pair" else runs
        others: Sequence[Side | None] = [None] * len(sides)
        if kind == "teacher":
            others = taught
        elif kind in ("statistics", "rows") and reference is not None:
            others = [reference.side] * len(sides)
        found = [
            _score(want, Sides(side, other, extractor, want.metric.output, next(iter(want.metric.keys))), settings)
            for side, other in zip(sides, others, strict=True)
            if side
        ]
        entries = combine(want, extractor, found, settings)
        if want.needs_teacher and plan.teacher is not None:
            beside = {"to": plan.teacher.source, "to_sha256": plan.teacher.record["sha256"]}
            if kind == "teacher" and settings.own_teacher_images:
                theirs = settings.teachers
                beside["to_seeds"] = f"{theirs.seed}..{theirs.seed + theirs.n - 1}"
            entries = {key: entry | beside for key, entry in entries.items()}
        metrics |= entries
    metrics |= accuracy([run for run in runs if isinstance(run, Measured)], x, plan.main)
    seconds = [s for run in runs if isinstance(run, Measured) for s in run.columns.seconds]
    if isinstance(x, Generator):
        if seconds:
            metrics["speed"] = throughput(seconds, min(settings.batch, settings.n), device)
        if plan.latency:
            metrics["speed"] = metrics.get("speed", {}) | latency(x, settings.seed, settings.labels, device)
        if pairs is not None and plan.distance and plan.teacher is not None:
            metrics["distance"] = _distance(pairs.columns, plan.teacher, settings)
    statistics = (
        runs[0].statistics(plan.main)
        if plan.main is not None and (isinstance(x, Numbers) or has(runs[0], plan.main))
        else None
    )
    notes = [*x.notes, *plan.notes, *(reference.notes if reference else []), *doubts(x, runs[0], reference, plan)]
    if isinstance(x, Pictures) and (copies := x.duplicates()):
        notes.append(f"{x.source}: {copies:,} of {x.n:,} images are pixel for pixel copies of another")
    if isinstance(x, Generator):
        names = [e.name for want in plan.wants if (e := plan.extractor(want))] + [
            w.metric.name for w in plan.wants if not w.metric.output
        ]
        notes += leak_notes(x.source, x.recipe, names)
    record = {
        **FORMAT,
        "d2o": __version__,
        "name": name or x.name,
        "x": {"kind": x.kind, "source": x.source, **x.record},
        "metrics": metrics,
        "protocol": protocol_of(x, runs[0], reference, plan, settings),
        "env": hardware(device),
        "timings": {"seconds": round(time.perf_counter() - started, 3), "generating": round(sum(seconds), 3)},
        "notes": list(dict.fromkeys(notes)),
    }
    place.check_stop(f"the pictures of {x.name}")
    if plan.grid and not isinstance(x, Numbers):
        record["grid"] = sample_grid(x, plan.teacher if plan.paired else None, settings, device)
    if plan.neighbours and not isinstance(x, Numbers) and reference is not None and plan.main is not None:
        place.check_stop(f"the nearest images of {x.name}")
        from d2o.evaluation.memorisation import nearest_images

        record["neighbours"] = nearest_images(x, runs[0], reference, plan.main, plan.neighbours, settings, device)
    return Evaluation(record, statistics)


def _score(want: Want, sides: Sides, settings: Settings) -> dict[str, Score]:
    with told(want.metric.name):
        return want.metric.compute(sides, settings)


def _main_passes(
    x: Subject, plan: Task, settings: Settings, device: Device, place: Workplace, meter: OpenMeter
) -> list[Side]:
    """X's own images, once for each run."""
    if isinstance(x, Numbers):
        return [Given(x.source, x.read)]
    outputs = plan.outputs()
    if plan.main is not None:
        wanted = outputs.setdefault(plan.main.name, (plan.main, set()))[1]
        wanted.add("features")
        if "logits" in plan.main.has and plan.main.shape is not None:
            wanted.add("logits")  # own classifiers also tell whether an image shows what it should
    for extractor, _ in outputs.values():
        check_subject(x, extractor)
    probes = feature_probes(outputs)
    if any(want.metric.name == "clip-score" for want in plan.wants):
        probes.append(ClipProbe(plan.tools.clip(settings.clip_model)))
    if any(want.metric.name == "prompt-accuracy" for want in plan.wants):
        probes.append(PromptProbe())
    if isinstance(x, Pictures):
        works, resize = [pictures_pass(x, settings, probes)], x.resize
    else:
        works, resize = (
            [generator_pass(x, settings, run, probes, device) for run in range(settings.repeats)],
            settings.preparation.describe(),
        )
    sides: list[Side] = []
    with meter(x.name, sum(work.n for work in works)) as progress:
        for work in works:
            sides.append(Measured(place.collect(work, progress), resize))
    return sides


def _teacher_passes(
    plan: Task, settings: Settings, device: Device, place: Workplace, meter: OpenMeter
) -> Sequence[Side]:
    """The teacher's images for rel-FID (GDD): of the same seeds in every run, or one set of its own, for all runs."""
    outputs = plan.outputs("teacher")
    if not outputs:
        return []
    teacher = plan.teacher
    assert teacher is not None
    for extractor, _ in outputs.values():
        check_subject(teacher, extractor)
    probes, resize = feature_probes(outputs), settings.preparation.describe()
    theirs = settings.teachers if settings.own_teacher_images else settings
    with meter(f"teacher {teacher.name}", theirs.n * theirs.repeats) as progress:
        works = [generator_pass(teacher, theirs, run, probes, device) for run in range(theirs.repeats)]
        sides = [Measured(place.collect(work, progress), resize) for work in works]
    return sides * settings.repeats if settings.own_teacher_images else sides


def _diversity_pass(
    x: Subject, plan: Task, settings: Settings, device: Device, place: Workplace, meter: OpenMeter
) -> Measured | None:
    outputs = plan.outputs("diversity")
    if not outputs:
        return None
    assert isinstance(x, Generator) and x.prompts is not None
    prompts = min(len(x.prompts), settings.n)
    work = generator_pass(
        x, settings, 0, feature_probes(outputs), device, settings.per_prompt, prompts * settings.per_prompt
    )
    with meter(f"{x.name}, {settings.per_prompt} images a prompt", work.n) as progress:
        return Measured(place.collect(work, progress))


def _pair_pass(
    x: Subject, plan: Task, settings: Settings, device: Device, place: Workplace, meter: OpenMeter
) -> Measured | None:
    wanted = [want.metric.name for want in plan.wants if want.metric.reference == "pair"]
    if not isinstance(x, Generator) or plan.teacher is None:
        return None
    if not wanted and (not plan.distance or plan.main is None):
        return None
    probes: list[Probe] = []
    if plan.distance and plan.main is not None:
        probes.append(DistanceProbe(plan.main))
    for key in wanted:
        if key == "dreamsim":
            probes.append(DreamSimProbe(plan.tools.extractor("dreamsim")))
            continue
        probes.append(PairProbe(key, plan.tools.pair_distance(key)))
    with meter(f"{x.name} beside {plan.teacher.name}", settings.distance_n) as progress:
        return Measured(place.collect(pair_pass(x, plan.teacher, settings, probes, device), progress))


def _distance(columns: Columns, teacher: Generator, settings: Settings) -> JsonObject:
    """How far x's images are from the teacher's of the same noise and condition: the root mean square per pixel (values
    in [-1, 1]) and the mean Euclidean distance of features (of 8-bit images); with the teacher's speed and calls."""
    speed = {"samples_per_s": len(columns.seconds) * columns.batch / sum(columns.seconds)} if columns.seconds else {}
    return {
        "rmse": columns.mean("pair/square") ** 0.5,
        "feature": columns.mean("pair/feature"),
        "n": columns.n,
        "seeds": [settings.seed, settings.seed + columns.n - 1],
        "teacher": {**speed, **described(teacher)},
    }
