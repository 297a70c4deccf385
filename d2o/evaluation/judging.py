"""What a network that judges images is worth on data with answers, as a result like any other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2o.data.distortions import MADE
from d2o.data.images import ImageSet, open_images
from d2o.data.triplets import TripletSet, open_triplets
from d2o.errors import UserError
from d2o.evaluation.collect import ImageBatch, OpenMeter, Pass
from d2o.evaluation.extractor import Device
from d2o.evaluation.judges import Judge
from d2o.evaluation.known_metrics import Want, combine, parse_metrics
from d2o.evaluation.measures import Score, mean_score
from d2o.evaluation.protocol import OWN, Settings, hardware
from d2o.evaluation.workplace import Workplace
from d2o.inputs import JsonObject
from d2o.losses.two_afc import REAL, agreement
from d2o.runtime import worker
from d2o.version import __version__

BAPPS = ("traditional", "cnn")
"""Kinds of BAPPS that papers print; the others together are "real"."""


Known = dict[tuple[str, int], TripletSet]
"""Triplets by where they are and the seed of made ones."""


@dataclass
class Judging:
    """One X with the sets it is asked about, one for each run, opened and checked."""

    x: Judge
    against: str
    sets: list[ImageSet | TripletSet]


def prepare_judging(
    x: Judge, metrics: Sequence[str], against: str | None, settings: Settings, on_bad: str, known: Known
) -> Judging:
    """`known`: sets that were opened before, and those opened now. UserError: a metric that x has not, no answers to
    hold it against, or images that it does not take."""
    for want in parse_metrics(metrics):
        if want.metric.name != x.metric:
            raise UserError(f"metric {want.metric.name}: {x.source} is a {x.kind}, which is measured by {x.metric}")
    if against is None:
        what = "labelled images" if x.kind == "classifier" else f"triplets, as BAPPS has them, or {' or '.join(MADE)}"
        raise UserError(f"{x.source} is a {x.kind}: {x.metric} needs answers", f"--against FOLDER of {what}")
    if settings.repeats > 1 and against not in MADE:
        raise UserError(
            f"--repeats {settings.repeats}: {against} is the same every time",
            f"it is for what is made by seeds, such as {MADE[1]}",
        )
    reading: dict[str, Any] = {
        "channels": 3,
        **{k: v for k, v in settings.preparation.reading().items() if v is not None},
    }
    if against in MADE:
        reading = {key: reading[key] for key in ("channels", "resolution") if key in reading}
    if x.kind == "classifier":
        images = open_images(against, on_bad=on_bad, **reading)
        if images.labels is None or images.classes != x.classes:
            has = f"{images.classes} classes" if images.labels is not None else "no labels"
            raise UserError(
                f"{x.source} tells {x.classes} classes apart, and {against} has {has}",
                "give a folder with one sub-folder per class",
            )
        x.check(images.shape)
        return Judging(x, against, [images])
    seeds = range(settings.seed, settings.seed + settings.repeats) if against in MADE else [0]
    for seed in seeds:
        if (against, seed) not in known:
            known[against, seed] = open_triplets(against, seed=seed, on_bad=on_bad, **reading)
    found = [known[against, seed] for seed in seeds]
    x.check((3, *found[0].shape[1:]))
    return Judging(x, against, [*found])


def judge(
    work: Judging, settings: Settings, name: str | None, device: Device, place: Workplace, meter: OpenMeter
) -> JsonObject | None:
    """The result; None for a worker that is not the first, which only helps."""
    started, x = time.perf_counter(), work.x
    passes = [_pass(x, images, settings) for images in work.sets]
    with meter(x.name, sum(one.n for one in passes)) as progress:
        columns = [place.collect(one, progress) for one in passes]
    if worker()[0] != 0:
        return None
    (want,) = parse_metrics([x.metric])
    if x.kind == "classifier":
        runs = [_top1(c.column("guess"), s, settings) for c, s in zip(columns, work.sets, strict=True)]
    else:
        runs = [_forced(c.column("d0"), c.column("d1"), s, settings) for c, s in zip(columns, work.sets, strict=True)]
    made = work.against in MADE
    protocol = {
        "n_gen": None,
        "seeds": [settings.seed, settings.seed + settings.repeats - 1] if made else None,
        "repeats": settings.repeats,
        "labels": None,
        "features": OWN,
        "weights_sha256": None,
        "resize": settings.preparation.describe(),
        "quantize": "as stored",
        "ref": work.against,
        "ref_kind": "images" if x.kind == "classifier" else "triplets",
        "n_ref": len(work.sets[0]),
        "ref_sha256": [images.fingerprint for images in work.sets],
    }
    return {
        "d2o": __version__,
        "name": name or x.name,
        "x": {"kind": x.kind, "source": x.source, **x.record},
        "metrics": combine(Want(want.metric, None), None, runs, settings),
        "protocol": protocol,
        "env": hardware(device),
        "timings": {"seconds": round(time.perf_counter() - started, 3), "generating": 0.0},
        "notes": [f"{work.against}: {note}" for note in work.sets[0].notes],
    }


def _pass(x: Judge, images: ImageSet | TripletSet, settings: Settings) -> Pass:
    def make(numbers: range) -> ImageBatch:
        return ImageBatch(images.images(torch.tensor([*numbers])))

    batch = min(settings.batch, len(images))
    identity = {"kind": "answers", "set": images.fingerprint, "resize": settings.resize}
    return Pass(x.name, len(images), batch, make, [x], identity)


def _top1(guess: Tensor, images: ImageSet | TripletSet, settings: Settings) -> dict[str, Score]:
    assert images.labels is not None
    right = (guess.long() == images.labels).float()
    names, each = images.class_names, dict[str, float]()
    for c in images.labels.unique().tolist():
        each[names[c] if c < len(names) else str(c)] = float(right[images.labels == c].mean())
    return {"top1": mean_score(right, settings, percent=True, per_class=each)}


def _forced(d0: Tensor, d1: Tensor, images: ImageSet | TripletSet, settings: Settings) -> dict[str, Score]:
    """2AFC of the whole set, the mean over its kinds of distortion; of BAPPS also of the kinds that papers print."""
    assert isinstance(images, TripletSet)
    scores = agreement(d0, d1, images.judgements)
    each = {kind: mean_score(scores[rows], settings, percent=True) for kind, rows in images.groups.items()}
    found = {f"2afc-{kind}": each[kind] for kind in BAPPS if kind in each}
    if each.keys() >= set(REAL):
        found["2afc-real"] = _average([each[kind] for kind in REAL])
    whole = _average(list(each.values()))
    whole.more["per_class"] = {kind: score.value for kind, score in each.items()}
    return {"2afc": whole, **found}


def _average(scores: Sequence[Score]) -> Score:
    """The mean of several scores, which are independent."""
    stds = [score.std for score in scores if score.std is not None]
    std = sum(s * s for s in stds) ** 0.5 / len(scores) if stds else None
    value = sum(score.value for score in scores) / len(scores)
    return Score(value, None, std, scores[0].error if stds else None, {"percent": True})
