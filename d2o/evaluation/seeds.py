"""One row of a table from several trainings: means of their numbers, and how far the seeds of training move them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from d2o.inputs import JsonObject


def over_seeds(records: Sequence[JsonObject], seeds: Sequence[int | None]) -> JsonObject:
    """The first record with the mean of each number over the records (two or more, of one protocol, of students
    trained with `seeds`), their values as `runs`, and their standard deviation (n - 1) as `std`. Its x names them all
    ("seeds"), and so does a note."""
    first = records[0]
    metrics = {}
    for key, metric in first["metrics"].items():
        values = [record["metrics"].get(key, {}).get("value") for record in records]
        if None in values:  # speed and distance, which are several numbers: the first run's
            metrics[key] = metric
            continue
        spread = {"runs": values, "std": statistics.stdev(values), "error": "seeds"}
        own = {name: metric[name] for name in metric if name not in ("per_class", "mean", "best", "report")}
        metrics[key] = {**own, "value": statistics.fmean(values), **spread}
    named = ", ".join(map(str, seeds))
    made = [{"source": record["x"]["source"], "sha256": record["x"].get("sha256")} for record in records]
    note = f"{first['name']}: mean and standard deviation of {len(records)} trainings, with the seeds {named}"
    return {**first, "x": {**first["x"], "seeds": made}, "metrics": metrics, "notes": [*first["notes"], note]}
