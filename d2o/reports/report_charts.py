"""The sections of report.html that show numbers as charts: metrics row by row, training curves, results by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from d2o.reports.cells import MetricEntry, Result, comparable, error_of, heading, number, paper_of, value_text
from d2o.reports.charts import COLOURS, Dot, Series, dot_chart, line_chart
from d2o.reports.comparison import metric_columns
from d2o.reports.curves import Curves
from d2o.reports.report_pictures import colour_legend, scroll, section

COMPARED = 3  # rows that make a chart worth its place
KINDS = {"student": 0, "teacher": 1, "images": 2, "pairs": 3, "statistics": 4}
WORDS = {"lower": "lower is better", "higher": "higher is better"}
CLASSES = 40  # that fit beside each other
WORST = 20
SIGNS = (
    ("Critic's logits", "logit_", "logit", "Of real images and of fakes: far apart, the critic has won.", False),
    (
        "Diversity of the fakes",
        "diversity",
        "spread",
        "Spread of a batch of fakes against that of real images; near 0: collapse.",
        True,
    ),
    (
        "Augmentation",
        "ada_p",
        "ADA p",
        "Probability of the critic's augmentations; above 0.8 they leak into the samples.",
        False,
    ),
    ("Gradient norms", "grad_", "norm", "Of each network, mean over its updates, before clipping.", True),
)  # title, keys, axis, what it shows, logarithmic


def comparison(records: Sequence[Result]) -> str:
    """A chart for each metric that at least three rows have under one protocol; rows of other protocols are never on
    one axis."""
    charts: list[str] = []
    kinds: dict[str, None] = {}
    papers = False
    for (key, _), column in metric_columns(records).items():
        groups: dict[str, list[int]] = {}
        for row, metric in column.items():
            if not metric.get("small_n"):
                groups.setdefault(comparable(records[row], key, metric), []).append(row)
        for rows in groups.values():
            if len(rows) >= COMPARED:
                dots = [_dot(records[row], key, column[row]) for row in rows]
                kinds |= {records[row]["x"]["kind"]: None for row in rows}
                papers = papers or any(d.mark is not None for d in dots)
                charts.append(_dots(column[rows[0]], dots))
    if not charts:
        return ""
    entries = [(f"s{KINDS.get(kind, 5)} dot", kind) for kind in kinds] + [("mark", "printed by the paper")] * papers
    lead = "Rows of one protocol only. Lines through the dots are the errors that the table gives after ±."
    return section("Side by side", lead, f'{colour_legend(entries)}<div class="charts">{"".join(charts)}</div>')


def _dot(record: Result, key: str, metric: MetricEntry) -> Dot:
    scale = 100 if metric.get("percent") else 1
    error, paper = error_of(metric), paper_of(record).get(key, (None,))[0]
    return Dot(
        record["name"],
        scale * metric["value"],
        value_text(metric),
        None if error is None else scale * error,
        KINDS.get(record["x"]["kind"], 5),
        None if paper is None else scale * paper,
    )


def _dots(metric: MetricEntry, dots: Sequence[Dot]) -> str:
    values = [d.value for d in dots]
    log = _wide(values)
    what = [
        WORDS.get(metric["better"], ""),
        "logarithmic axis" if log else "",
        "per cent" if metric.get("percent") else "",
    ]
    title = f"{metric['label']} of {len(dots)} rows"
    says = ", ".join(filter(None, what))
    return (
        f'<div class="card chart"><h3>{escape(heading(metric))}</h3><p>{says[:1].upper() + says[1:]}</p>'
        f"{dot_chart(dots, title, log)}</div>"
    )


def _wide(values: Sequence[float]) -> bool:
    """Small ones would be one dot on an even axis."""
    return min(values) > 0 and max(values) > 20 * min(values)


def training(curves: Sequence[Curves]) -> str:
    losses = [
        Series(_named(c, key, curves), *_xy(points), smooth=True) for c in curves for key, points in c.losses.items()
    ]
    charts = [_lines("Training loss", "As logged (thin) and smoothed (thick).", losses, "loss")]
    for title, start, axis, about, log in SIGNS:
        told = [(c, key) for c in curves for key in c.signs if key.startswith(start)]
        names = [[c.name] * (len(curves) > 1) + [key] * (start.endswith("_") or len(curves) == 1) for c, key in told]
        series = [
            Series(": ".join(name), *_xy(c.signs[key]), smooth=True) for (c, key), name in zip(told, names, strict=True)
        ]
        charts.append(_lines(title, about, series, axis, log))
    for key in dict.fromkeys(key for c in curves for key in c.scores):
        series = [Series(c.name, *_xy(c.scores[key]), marks=True) for c in curves if key in c.scores]
        what = "Fréchet distance" if key == "fd" else key
        about = "On the recipe's own n and seeds: not comparable with the table."
        charts.append(_lines(f"{what[:1].upper()}{what[1:]} during training", about, series, what))
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    return section(
        "Training",
        f"From {', '.join(c.name for c in curves)}.",
        f'{_verdicts(curves)}<div class="charts">{"".join(charts)}</div>',
    )


def _verdicts(curves: Sequence[Curves]) -> str:
    """What the watch of adversarial runs said last: it names the first bad iteration."""
    lines = [
        f"<li{'' if c.watch.startswith('stable') else ' class=warning'}>{escape(c.name)}: {escape(c.watch)}</li>"
        for c in curves
        if c.watch
    ]
    return f'<ul class="protocol watch">{"".join(lines)}</ul>' if lines else ""


def _named(run: Curves, key: str, curves: Sequence[Curves]) -> str:
    names = [run.name] if len(curves) > 1 else []
    return ": ".join([*names, key]) if len(run.losses) > 1 or not names else run.name


def _xy(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _lines(title: str, what: str, series: Sequence[Series], y_label: str, log: bool = True) -> str:
    log = log and all(y > 0 for s in series for y in s.y) and y_label != "accuracy"
    svg = line_chart(series, "images seen", y_label, log_y=log)
    if not svg:
        return ""
    keys = colour_legend((f"s{i % COLOURS}", s.name) for i, s in enumerate(series)) if len(series) > 1 else ""
    about = f"{escape(what)}{' Logarithmic axis.' if log else ''}"
    return f'<div class="card chart"><h3>{escape(title)}</h3><p>{about}</p>{keys}{scroll(title, svg, "plot ")}</div>'


def by_class(records: Sequence[Result]) -> str:
    """A table for each metric that is known class by class."""
    return "".join(_by_class(records, key, column) for (key, _), column in metric_columns(records).items())


def _by_class(records: Sequence[Result], key: str, column: dict[int, MetricEntry]) -> str:
    scored = {row: m for row, m in column.items() if m.get("per_class")}
    classes = list(dict.fromkeys(c for m in scored.values() for c in m["per_class"]))
    if not classes:
        return ""
    first = next(iter(scored.values()))
    lower = first["better"] == "lower"
    told = ""
    if len(classes) > CLASSES:
        means = {
            c: sum(v) / len(v)
            for c in classes
            if (v := [m["per_class"][c] for m in scored.values() if c in m["per_class"]])
        }
        told = f" The {WORST} worst of {len(classes):,} classes, on average over the rows."
        classes = sorted(means, key=lambda c: -means[c] if lower else means[c])[:WORST]
    values = [m["per_class"][c] for m in scored.values() for c in classes if c in m["per_class"]]
    percent = bool(first.get("percent"))
    low, high = (0.75, 1.0) if percent and not lower else (min(values), max(values))
    log = _wide(values) and not percent
    rows = []
    for row, m in scored.items():
        cells = "".join(_cell(str(c), m["per_class"].get(c), low, high, percent, lower, log) for c in classes)
        rows.append(f'<tr><th scope="row">{escape(records[row]["name"])}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{escape(str(c))}</th>' for c in classes)
    if key == "accuracy":
        features = ", ".join(dict.fromkeys(records[row]["protocol"]["features"].partition("/")[0] for row in scored))
        about = (
            f"Per cent of the images of each class that the classifier of the extractor {features} takes for that"
            " class."
        )
    else:
        about = (
            f"{first['label']} within each class{', per cent' if percent else ''};"
            f" {WORDS.get(first['better'], 'neither end is better')}."
        )
    label = first["label"]
    title = f"{label[:1].upper() + label[1:]} by class" if "by class" not in label else label
    table = (
        '<table class="heat"><thead><tr><th'
        f' scope="col">class</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    return section(title, about + told, scroll(title, table))


def _cell(name: str, value: float | None, low: float, high: float, percent: bool, lower: bool, log: bool) -> str:
    if value is None:
        return f'<td data-label="{escape(name)}">–</td>'
    at, low, high = (math.log(v) if log else v for v in (value, low, high))
    share = min(max((at - low) / (high - low), 0), 1) if high > low else float(not lower)
    text = f"{100 * value:.1f}" if percent else number(value)
    return f'<td class="cell" data-label="{escape(name)}" style="--v:{1 - share if lower else share:.3f}">{text}</td>'
