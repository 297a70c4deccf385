"""Orders that papers claim between two rows of a table, and whether the numbers of this one show them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2o.inputs import JsonObject
from d2o.reports.cells import metrics, number
from d2o.settings.section import NonEmpty, Section

SEEN, REVERSED, OPEN, MISSING = "seen", "the other way round", "not decided", "not measured"


class PaperOrder(Section):
    """`claim`: what the paper says, with its numbers and place; the row `better` is better than the row `than` by the
    metric `by` (lower or higher, as that metric has it)."""

    claim: NonEmpty
    better: NonEmpty
    than: NonEmpty
    by: NonEmpty


@dataclass(frozen=True)
class Verdict:
    """Of `seeds` pairs of trainings with equal seeds in `agree` the order holds; `gain`: by how much the row that is
    claimed to be better is better, in the metric's units (mean over the pairs), with its standard error (None: one
    pair)."""

    order: PaperOrder
    word: str
    first: float | None = None
    second: float | None = None
    gain: float | None = None
    error: float | None = None
    agree: int = 0
    seeds: int = 0

    @property
    def text(self) -> str:
        if self.first is None or self.second is None or self.gain is None:
            return f"{self.order.claim}: {self.word}"
        spread = "" if self.error is None else f" ± {number(self.error)}"
        return (
            f"{self.order.claim}: {self.word} ({self.order.by} {number(self.first)} and {number(self.second)};"
            f" gain {number(self.gain)}{spread}, {self.agree} of {self.seeds} seeds)"
        )


Records = Mapping[str, Mapping[int | None, JsonObject]]
"""Name of a row -> seed of training (None: it is not trained) -> its record."""


def verdict_on(order: PaperOrder, rows: Records) -> Verdict:
    """Seen or reversed: 0 lies outside the mean gain's 95 % interval (Student's t) over the seeds that both rows have.
    One training of each decides nothing."""
    from scipy.stats import t as student_t

    first, second = _values(order, rows, order.better), _values(order, rows, order.than)
    pairs = [
        (a, b) for seed, a in first.items() for other, b in second.items() if None in (seed, other) or seed == other
    ]
    if not pairs:
        return Verdict(order, MISSING)
    sign = -1 if _lower(order, rows) else 1
    gains = [sign * (a - b) for a, b in pairs]
    gain = statistics.fmean(gains)
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
    decided = error is not None and abs(gain) > error * student_t.ppf(0.975, len(gains) - 1)
    word = OPEN if not decided else SEEN if gain > 0 else REVERSED
    means = statistics.fmean(a for a, _ in pairs), statistics.fmean(b for _, b in pairs)
    return Verdict(order, word, means[0], means[1], gain, error, sum(g > 0 for g in gains), len(gains))


def verdicts(orders: Sequence[PaperOrder], rows: Records) -> list[Verdict]:
    return [verdict_on(order, rows) for order in orders]


def _entries(order: PaperOrder, rows: Records, name: str) -> dict[int | None, JsonObject]:
    """The metric, by seed, where it was measured; a table's "fd" is a record's "fd@digits" too."""
    found = {}
    for seed, record in rows.get(name, {}).items():
        for key, metric in metrics(record):
            if order.by in (key, key.partition("@")[0]) and metric["better"]:
                found[seed] = metric
    return found


def _values(order: PaperOrder, rows: Records, name: str) -> dict[int | None, float]:
    return {seed: metric["value"] for seed, metric in _entries(order, rows, name).items()}


def _lower(order: PaperOrder, rows: Records) -> bool:
    return next(iter(_entries(order, rows, order.better).values()))["better"] == "lower"
