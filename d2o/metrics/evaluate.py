"""Every metric that applies to one subject, with its protocol, as a JSON-able record. Also the quick score that training asks for."""

from __future__ import annotations

import statistics as stats
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from d2o import __version__
from d2o.data.draws import label_mode
from d2o.data.images import to_uint8
from d2o.metrics.features import Extractor, load_extractor
from d2o.metrics.frechet import TRACE_METHOD
from d2o.metrics.grids import sample_grid
from d2o.metrics.protocol import QUANTIZE, Settings, hardware, metric_label, noise_for
from d2o.metrics.reference import Reference, load_reference
from d2o.metrics.statistics import Statistics, check_same_features
from d2o.metrics.subjects import Device, Generate, Generator, Numbers, Pictures, Subject, check_subject
from d2o.metrics.tally import Meter, Progress, Tally, blocks, check_finite, silent, tally_generator, tally_pictures
from d2o.teachers.base import Spec

FORMAT = {"format": "d2o-eval", "version": 1}


@dataclass
class Evaluation:
    """`record` is the JSON result; `statistics` those of X's first run."""

    record: dict[str, Any]
    statistics: Statistics


def evaluate_one(
    x: Subject, reference: Reference | None, extractor: Extractor | None, settings: Settings, *, teacher: Generator | None = None,
    name: str | None = None, device: Device = "cpu", grid: bool = True, notes: tuple[str, ...] = (), meter: Meter = silent,
) -> Evaluation:  # fmt: skip
    """Measure `x`. `reference` None: no Fréchet distance, only what needs no reference. `teacher`: measured against from equal noise.

    `extractor` may be None only where x and reference are statistics. Global random state is neither used nor changed.
    UserError: statistics of another extractor, images of another shape, too few, NaN or infinite values.
    """
    started = time.perf_counter()
    with meter(name or x.name, work(x, settings)) as progress:
        tallies, runs = _measure(x, extractor, settings, device, progress)
    notes = (*x.notes, *notes)
    metrics: dict[str, Any] = {}
    if reference is not None:
        check_same_features(runs[0], reference.statistics)
        metrics["fd"] = _fd(runs, reference)
        notes = (*notes, *reference.notes, *_warnings(x, runs[0], reference))
    metrics |= _answers(tallies)
    if isinstance(x, Generator):
        metrics["speed"] = _speed(tallies, min(settings.batch, settings.n), device)
        if teacher is not None and extractor is not None:
            with meter(f"{name or x.name} beside {teacher.name}", settings.distance_n) as progress:
                metrics["distance"] = teacher_distance(x, teacher, extractor, settings, device, progress)
    timings = {"seconds": round(time.perf_counter() - started, 3), "generating": round(sum(sum(t.seconds) for t in tallies), 3)}
    record = {
        **FORMAT, "d2o": __version__, "name": name or x.name, "x": {"kind": x.kind, "source": x.source, **x.record}, "metrics": metrics,
        "protocol": _protocol(x, runs[0], reference, settings), "env": hardware(device), "timings": timings,
        "notes": list(dict.fromkeys(notes)),
    }  # fmt: skip
    if grid and not isinstance(x, Numbers):
        record["grid"] = sample_grid(x, teacher, settings, device)
    return Evaluation(record, runs[0])


def _measure(x: Subject, extractor: Extractor | None, settings: Settings, device: Device, progress: Progress) -> tuple[list[Tally], list[Statistics]]:
    """The passes over x's images, and the feature statistics of each."""
    if isinstance(x, Numbers):
        if extractor is not None:
            check_same_features(x.statistics, Statistics.none(extractor))
        return [], [x.statistics]
    if extractor is None:
        raise ValueError("images need an extractor")
    check_subject(x, extractor)
    if isinstance(x, Pictures):
        tally = tally_pictures(x, extractor, settings.batch, progress)
        return [tally], [Statistics.of(tally.features, extractor, x.resize)]
    tallies = []
    for run in range(settings.repeats):
        seeds = range(settings.seed + run * settings.n, settings.seed + (run + 1) * settings.n)
        tallies.append(
            tally_generator(
                x.generate, x.spec, extractor, seeds, batch=settings.batch, labels=settings.labels, first_seed=settings.seed,
                who=x.name, device=device, progress=progress,
            )
        )  # fmt: skip
    return tallies, [Statistics.of(t.features, extractor) for t in tallies]


def _fd(runs: list[Statistics], reference: Reference) -> dict[str, Any]:
    values, ref = [run.distance(reference.statistics) for run in runs], reference.statistics
    return {
        "label": metric_label(runs[0].feature or ref.feature or f"{ref.dim} features"), "value": stats.fmean(values), "runs": values,
        "std": stats.stdev(values) if len(values) > 1 else None, "trace": TRACE_METHOD,
        "small_n": runs[0].rank_deficient or ref.rank_deficient,
    }  # fmt: skip


def _warnings(x: Subject, run: Statistics, reference: Reference) -> list[str]:
    notes = []
    for who, s in ((x.source, run), (f"the reference {reference.name}", reference.statistics)):
        if s.rank_deficient:
            notes.append(f"{who} has {s.n:,} images for {s.dim} features: too few, the distance comes out far too large")
    if run.resize and reference.statistics.resize and run.resize != reference.statistics.resize and reference.kind != "statistics":
        notes.append(f"{x.source}: resize {run.resize}; the reference {reference.name}: resize {reference.statistics.resize}")
    if not isinstance(x, Numbers) and not reference.statistics.weights_sha256:
        notes.append(f"{reference.name} doesn't say which weights made it; taken to be of the same extractor")
    if x.source.startswith("real:") and x.source.startswith(reference.name):
        notes.append(f"{x.source} is part of its own reference")
    return notes


def _answers(tallies: list[Tally]) -> dict[str, Any]:
    runs = [t.accuracy for t in tallies if t.accuracy is not None]
    if not runs:
        return {}
    right = torch.stack([t.right for t in tallies]).sum(0).tolist()
    seen = torch.stack([t.seen for t in tallies]).sum(0).tolist()
    per_class = {str(c): right[c] / seen[c] for c in range(len(seen)) if seen[c]}
    return {"accuracy": {"value": stats.fmean(runs), "runs": runs, "per_class": per_class, "n": sum(seen)}}


def _speed(tallies: list[Tally], batch: int, device: Device) -> dict[str, Any]:
    """Images/s of generating alone: the median over full batches, without the first (warm-up) where there are several."""
    seconds = [s for t in tallies for s in t.seconds]
    timed = seconds[1:] or seconds
    return {
        "samples_per_s": batch / max(stats.median(timed), 1e-9), "batch": batch, "batches": len(timed),
        "warm_up_excluded": len(seconds) > 1, "device": torch.device(device).type,
    }  # fmt: skip


def teacher_distance(
    x: Generator, teacher: Generator, extractor: Extractor, settings: Settings, device: Device = "cpu",
    progress: Progress = lambda done: None,
) -> dict[str, Any]:  # fmt: skip
    """How far x's images are from the teacher's of the same noise and labels, over settings.distance_n images: the root mean square
    per pixel (values in [-1, 1]) and the mean Euclidean distance of features (of quantised images); with the teacher's speed and calls."""
    square, feature, pixels, seconds = 0.0, 0.0, 0, 0.0
    seeds = range(settings.seed, settings.seed + settings.distance_n)
    for part in blocks(seeds, settings.batch):
        noise, labels = noise_for(x.spec, part, settings.labels, seeds[0])
        noise, labels = noise.to(device), None if labels is None else labels.to(device)
        ours = x.generate(noise, labels)
        start = time.perf_counter()
        theirs = teacher.generate(noise, labels).cpu()  # waits for the device
        seconds += time.perf_counter() - start
        ours = ours.cpu()
        check_finite(ours, part, x.name)
        square += float((ours - theirs).double().square().sum())
        pixels += ours.numel()
        gap = extractor.features(to_uint8(ours)).double() - extractor.features(to_uint8(theirs)).double()
        feature += float(gap.norm(dim=1).sum())
        progress(len(part))
    made = {key: teacher.record[key] for key in ("sha256", "solver", "steps", "cfg", "nfe", "forwards")}
    return {
        "rmse": (square / pixels) ** 0.5, "feature": feature / len(seeds), "n": len(seeds), "seeds": [seeds[0], seeds[-1]],
        "teacher": {"source": teacher.source, "samples_per_s": len(seeds) / seconds, **made},
    }  # fmt: skip


def work(x: Subject, settings: Settings) -> int:
    """How many images the measurement of x goes through."""
    if isinstance(x, Generator):
        return settings.n * settings.repeats
    return x.n if isinstance(x, Pictures) else 0


def _protocol(x: Subject, run: Statistics, reference: Reference | None, settings: Settings) -> dict[str, Any]:
    """Everything that a number depends on, besides x's weights."""
    protocol: dict[str, Any] = {
        "n_gen": run.n, "seeds": None, "repeats": 1, "labels": None, "features": f"{run.feature or 'not stated'}/{run.dim}",
        "weights_sha256": run.weights_sha256 or None, "resize": run.resize or None, "quantize": None, "ref": None, "n_ref": None,
    }  # fmt: skip
    if isinstance(x, Generator):
        labels = label_mode(settings.labels, x.spec.classes, x.spec.name) if x.spec.classes else None
        protocol["seeds"] = [settings.seed, settings.seed + settings.n * settings.repeats - 1]
        protocol |= {"repeats": settings.repeats, "labels": labels, "quantize": QUANTIZE}
    elif isinstance(x, Pictures):
        protocol |= {"labels": "own" if x.labelled else None, "quantize": QUANTIZE if x.kind == "pairs" else "as stored"}
    if reference is not None:
        protocol |= {"ref": reference.name, "ref_kind": reference.kind, "n_ref": reference.statistics.n, "ref_seeds": reference.seeds,
                     "ref_resize": reference.statistics.resize or None}  # fmt: skip
    return protocol


@lru_cache(maxsize=4)
def _cached(extractor: str, reference: str, device: str) -> tuple[Extractor, Reference]:
    with torch.random.fork_rng(devices=[]):  # a network draws initial weights before it takes those of its file
        network = load_extractor(extractor, device)
        return network, load_reference(reference, network, Settings(resize="crop"), device)


class FrechetEvaluator:
    """A score taken again and again against one reference, which is loaded once. Deterministic; global random state is left alone."""

    def __init__(self, extractor: str, reference: str, device: Device = "cpu"):
        self.device = device
        self.extractor, self.reference = _cached(extractor, reference, str(device))

    def score(self, generate: Generate, spec: Spec, *, n: int, seed: int, batch: int = 250, labels: str | None = None) -> dict[str, float]:
        """{"fd": float, and "accuracy": float where classes are known} of the images of seeds seed .. seed + n - 1.

        generate(noise [b, C, H, W], class indices [b] or None) -> decoded images [b, C, H, W] in [-1, 1], its networks in eval mode.
        UserError: NaN or infinite values.
        """
        with torch.inference_mode():
            tally = tally_generator(generate, spec, self.extractor, range(seed, seed + n), batch=batch, labels=labels, device=self.device)
        scores = {"fd": Statistics.of(tally.features, self.extractor).distance(self.reference.statistics)}
        if tally.accuracy is not None:
            scores["accuracy"] = tally.accuracy
        return scores


def quick_fd(
    generate: Generate, spec: Spec, extractor: str, reference: str, n: int = 1000, seed: int = 2_000_000, batch: int = 250,
    device: Device = "cpu",
) -> dict[str, float]:  # fmt: skip
    """The score of a student in training, as `FrechetEvaluator.score`; extractor and reference stay in memory between calls.
    Reference images of another size are scaled and centre-cropped, as training data are."""
    return FrechetEvaluator(extractor, reference, device).score(generate, spec, n=n, seed=seed, batch=batch)
