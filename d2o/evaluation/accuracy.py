"""Whether images show the class that they were asked for, by an extractor that is itself a classifier of these
classes."""

from __future__ import annotations

import statistics as stats
from collections.abc import Sequence

import torch

from d2o.evaluation.extractor import Extractor
from d2o.evaluation.sides import Measured
from d2o.evaluation.subjects import Generator, Pictures, Subject
from d2o.inputs import JsonObject


def accuracy(runs: Sequence[Measured], x: Subject, extractor: Extractor | None) -> JsonObject:
    """{"accuracy": entry} over the runs, by class, or {} where the labels mean nothing to the extractor.

    Labels (-1: none) count if x has as many classes as the extractor; a set of images whose classes are called by
    numbers may hold a few.
    """
    classes = x.spec.classes if isinstance(x, Generator) else x.classes if isinstance(x, Pictures) else 0
    if (
        extractor is None
        or extractor.shape is None
        or not extractor.classes
        or classes not in (None, extractor.classes)
    ):
        return {}
    shares, right, seen = [], *torch.zeros(2, extractor.classes, dtype=torch.int64)
    for run in runs:
        labels = run.labels
        if labels is None or int(labels.max()) >= extractor.classes:  # a foreign label: then its answers say nothing
            return {}
        guess = run.column(extractor, "logits").argmax(1)
        known = labels >= 0
        hits = labels[known & (labels == guess)]
        shares.append(len(hits) / int(known.sum()))
        seen += torch.bincount(labels[known], minlength=extractor.classes)
        right += torch.bincount(hits, minlength=extractor.classes)
    if not shares:
        return {}
    per_class = {str(c): int(right[c]) / int(seen[c]) for c in range(extractor.classes) if seen[c]}
    return {
        "accuracy": {
            "label": "accuracy",
            "value": stats.fmean(shares),
            "runs": shares,
            "std": stats.stdev(shares) if len(shares) > 1 else None,
            "error": "runs",
            "better": "higher",
            "percent": True,
            "per_class": per_class,
            "n": int(seen.sum()),
        }
    }
