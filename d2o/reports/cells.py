"""How one number of a result is named and printed, wherever it appears: the same label, digits, marks and order
everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from d2o.inputs import JsonObject

NONE = "–"
SMALL_N = "†"
ARROWS = {"lower": "↓", "higher": "↑"}
ORDER = (
    "fid",
    "fid-clean",
    "fid-pytorch",
    "fd",
    "sfid",
    "fd-dinov2",
    "clip-fid",
    "fd-class",
    "rel-fid",
    "rel-fd",
    "kid",
    "is",
    "precision",
    "recall",
    "density",
    "coverage",
    "clip-score",
    "lpips",
    "latent-lpips",
    "dreamsim",
    "dreamdiv",
    "diversity",
    "prompt-accuracy",
    "accuracy",
    "top1",
    "2afc",
)
DEFAULTS: dict[str, JsonObject] = {
    "fd": {"better": "lower"},
    "accuracy": {"label": "accuracy", "better": "higher", "percent": True},
    **{key: {"percent": True} for key in ("top1", "2afc", "2afc-traditional", "2afc-cnn", "2afc-real")},
}
"""What results of d2o 0.1.0, and rows that are only quoted, do not say of their metrics."""

Result = JsonObject
MetricEntry = JsonObject


def metrics(record: Result) -> Iterator[tuple[str, MetricEntry]]:
    """(key, metric) of everything in a record that is one number; not speed and distance, which are several. Well-known
    ones first."""
    found = {}
    for key, metric in record["metrics"].items():
        if isinstance(metric, dict) and metric.get("value") is not None:
            found[key] = {"label": key, "better": None, "std": None, "runs": [], **DEFAULTS.get(key, {}), **metric}
    yield from sorted(found.items(), key=lambda item: rank(item[0]))


def rank(key: str) -> int:
    """Place of a metric among columns; "kid@digits" and "kid-x" stand where "kid" does, unknown ones last."""
    base = key.partition("@")[0]
    while base not in ORDER and "-" in base:
        base = base.rpartition("-")[0]
    return ORDER.index(base) if base in ORDER else len(ORDER)


def heading(metric: MetricEntry) -> str:
    """FID-50k ↓"""
    return " ".join([metric["label"], *filter(None, [ARROWS.get(metric["better"])])])


VALUES = ("value", "runs", "std", "mean", "best", "per_class", "small_n")
WORDING = ("label", "better", "percent", "error", "report", "trace")


def settings(metric: MetricEntry) -> dict[str, str | int]:
    """How this one number was made, beyond its record's protocol: n, k, subsets, dtype, ..."""
    return {k: v for k, v in metric.items() if k not in (*VALUES, *WORDING) and isinstance(v, (str, int))}


def comparable(record: Result, key: str, metric: MetricEntry) -> str:
    """Equal for numbers that may be compared: same label, same protocol in every field, same settings of the metric."""
    protocol = {k: v for k, v in (record.get("protocol") or {}).items() if v is not None}
    return json.dumps(
        [key, metric["label"], metric.get("report"), settings(metric), protocol], sort_keys=True, default=str
    )


def error_of(metric: MetricEntry) -> float | None:
    """What stands after ±. A minimum of runs has none: their deviation is not its uncertainty."""
    return None if metric.get("report") == "min" else metric["std"]


def value_text(metric: MetricEntry, decimals: int = 0, mark: bool = True) -> str:
    """1.42, or 1.420 ± 0.031 (two digits of the deviation), or 97.5 %; at least `decimals` decimals, to stand beside a
    printed number."""
    percent = bool(metric.get("percent"))
    value, std = ((100 if percent else 1) * v if v is not None else None for v in (metric["value"], error_of(metric)))
    assert value is not None
    if percent:
        text = f"{value:.1f}" + ("" if std is None else f" ± {std:.1f}") + " %"
    elif std:
        places = min(1 - math.floor(math.log10(std)), 4 - (math.floor(math.log10(abs(value))) if value else 0))
        places = max(places, decimals, 0)
        spread = f"{std:,.{places}f}"
        text = f"{value:,.{places}f} ± {spread if float(spread.replace(',', '')) else number(std)}"
    else:
        text = number(value, decimals) + ("" if std is None else f" ± {number(std)}")
    return text + (SMALL_N if mark and metric.get("small_n") else "")


def number(value: float, decimals: int = 0) -> str:
    """Three significant digits, at least `decimals` decimals: 0.0123, 1.20, 12.3, 1,234."""
    text = "0" if value == 0 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return text if "e" in text or len(text.partition(".")[2]) >= decimals else f"{value:,.{decimals}f}"


def paper_of(record: Result) -> dict[str, tuple[float, float | None]]:
    """What the paper prints for the row: key -> (value, standard deviation or None)."""
    found = {}
    for key, value in (record.get("paper") or {}).items():
        pair = value if isinstance(value, (list, tuple)) else (value, None)
        if pair[0] is not None:
            found[key] = (pair[0], pair[1])
    return found


def printed(value: float, std: float | None = None, percent: bool = False) -> str:
    """A number as a paper prints it: all the digits it was given with."""
    scale = 100 if percent else 1
    text = " ± ".join(f"{scale * v:,.10g}" for v in (value, std) if v is not None)
    return f"{text} %" if percent else text


COSTS = {
    "parameters": "params, paper",
    "batch": "batch, paper",
    "images_per_s": "images/s, paper",
    "pairs": "pairs, paper",
    "nfe_pairs": "NFE of pairs, paper",
    "nfe_train": "NFE of training, paper",
    "nfe_total": "NFE in all, paper",
    "a100_days": "A100-days, paper",
    "milliseconds": "ms, paper",
    "gigabytes": "GB, paper",
    "seconds_per_kimg": "s/1k images, paper",
    "hours_per_10mimg": "h/10M images, paper",
    "days_per_100mimg": "days/100M images, paper",
}
"""What papers print of a model's size and making -> the heading of its column."""


def cost_text(key: str, value: float) -> str:
    """98.3M, 43.6: counts of many zeros shortened."""
    return magnitude(value) if key != "batch" and value >= 1e4 else f"{value:,.10g}"


def printed_decimals(value: float) -> int:
    return len(f"{value:.10g}".partition(".")[2])


CITED, NOT_RUN, FAILED = "cited", "not run", "failed"
"""Of a table's rows that have no numbers of their own: d2o does not make them; it does, and has not yet; it could not
measure what is here."""


def quoted(name: str, paper: JsonObject, source: str, notes: Sequence[str] = (), status: str | None = None) -> Result:
    """A row that was not measured: only what a paper prints, and why there is no more (`status`)."""
    record = {"name": name, "x": {"kind": "quoted", "source": source}, "metrics": {}, "paper": paper, "notes": [*notes]}
    return record if status is None else {**record, "status": status}


def has_protocol(record: Result) -> bool:
    """Whether it was measured here."""
    return bool(record.get("protocol"))


def magnitude(count: float) -> str:
    """55.7M parameters."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{number(count / size)}{unit}".replace(".00", "")
    return f"{count:,}"


def memory(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{number(size / 2**30)} GiB" if size >= 2**30 else f"{number(size / 2**20)} MiB"


def milliseconds(value: float) -> str:
    return f"{number(value / 1000)} s" if value >= 10_000 else f"{number(value)} ms"


def machine(record: Result) -> str:
    env = record["env"]
    return f"{env.get('gpu') or env['cpu']}, {env['threads']} thread{'s' * (env['threads'] != 1)}"
