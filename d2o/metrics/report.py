"""report.html: results, samples from equal noise and training curves on one self-contained page. Nothing is fetched, nothing is run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from d2o import __version__
from d2o.errors import UserError
from d2o.interop.safetensors_io import atomic_write
from d2o.metrics.charts import COLOURS, Series, line_chart
from d2o.metrics.curves import Curves, read_curves
from d2o.metrics.protocol import protocol_line
from d2o.metrics.records import check_target
from d2o.metrics.table import number, results_table

STYLE = Path(__file__).with_name("report.css")
MARK = '<meta name="generator" content="d2o'
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Record = dict[str, Any]


def write_report(path: str | Path, records: Sequence[Record], runs: Sequence[str | Path] = (), title: str = "d2o report") -> None:
    """Write the page (atomically). UserError: `runs` without metrics.jsonl, or `path` holds a page that isn't d2o's."""
    check_report_target(path)
    atomic_write(path, render(records, [read_curves(run) for run in runs], title))


def check_report_target(path: str | Path) -> None:
    """UserError if writing to `path` would overwrite something else, or cannot work."""
    check_target(path)
    path = Path(path)
    if path.exists() and path.stat().st_size and MARK.encode() not in path.read_bytes()[:4096]:
        raise UserError(f"{path} exists and is not a report of d2o: it is not overwritten", "choose another name for --report")


def render(records: Sequence[Record], curves: Sequence[Curves] = (), title: str = "d2o report") -> str:
    """The whole page."""
    sections = [_results(records), *_samples(records), _training(curves), _classes(records), _details(records)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK} {__version__}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(records))}</p></header>\n{_tiles(records)}\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Made by d2o {__version__}. This page is complete in itself: it loads nothing and runs no script.</footer>\n"
        "</main></body></html>\n"
    )


def _subtitle(records: Sequence[Record]) -> str:
    students = [r for r in records if r["x"]["kind"] == "student"]
    makers = dict.fromkeys(r["x"]["teacher"] for r in students if r["x"].get("teacher"))
    what = f"One-step student{'s' * (len(students) != 1)} of the teacher {', '.join(makers)}" if makers else f"{len(records)} results"
    machines = dict.fromkeys(f"{r['env'].get('gpu') or r['env']['cpu']}, {r['env']['threads']} threads, torch {r['env']['torch']}" for r in records)
    return " · ".join([what, *machines])


def _tiles(records: Sequence[Record]) -> str:
    """The student beside the teacher, in four numbers; only numbers of one protocol stand beside each other."""
    students = [r for r in records if r["x"]["kind"] == "student" and "fd" in r["metrics"]]
    if not students:
        return ""
    student = min(students, key=lambda r: r["metrics"]["fd"]["value"])
    same = protocol_line(student["protocol"])
    teachers = [r for r in records if r["x"]["kind"] == "teacher" and "fd" in r["metrics"] and protocol_line(r["protocol"]) == same]
    teacher = max(teachers, key=lambda r: r["x"]["nfe"], default=None)
    once = next((r for r in teachers if r["x"]["nfe"] == 1 and r is not teacher), None)
    fd = student["metrics"]["fd"]
    beside = [f"{name} {number(r['metrics']['fd']['value'])}" for name, r in (("teacher", teacher), ("teacher called once", once)) if r]
    tiles = [(f"{fd['label']}, lower is better", number(fd["value"]), " · ".join(beside) or f"n = {student['protocol']['n_gen']:,}")]
    if teacher is not None:
        ours, theirs = (r["metrics"]["speed"]["samples_per_s"] for r in (student, teacher))
        tiles.insert(0, ("Network calls per image", f"{teacher['x']['nfe']} → {student['x']['nfe']}", "teacher → student"))
        tiles.append(("Sampling speed", f"{number(ours / theirs)}×", f"{number(ours)} images/s · teacher {number(theirs)}"))
    if "accuracy" in student["metrics"]:
        also = f"teacher {100 * teacher['metrics']['accuracy']['value']:.1f} %" if teacher and "accuracy" in teacher["metrics"] else ""
        tiles.append(("Class accuracy", f"{100 * student['metrics']['accuracy']['value']:.1f} %", also))
    cards = "".join(
        f'<div class="card tile"><div class="what">{escape(what)}</div><div class="value">{escape(value)}</div>'
        f'<div class="beside">{escape(also)}</div></div>'
        for what, value, also in tiles
    )
    return f'<div class="tiles">{cards}</div>'


def _results(records: Sequence[Record]) -> str:
    table = results_table(records)
    rows = [
        f'<tr class="{escape(r["x"]["kind"])}"><td>{escape(cells[0])}<span class="kind">{escape(r["x"]["kind"])}</span></td>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        + "</tr>"
        for r, cells in zip(records, table.rows, strict=True)
    ]
    return (
        '<section><h2>Results</h2><p class="lead">Fréchet distances (FD, named by the network whose features they compare) are '
        "comparable only under one protocol: equal n, features, reference and pixel handling, all stated below.</p>"
        f'<div class="card scroll"><table><thead><tr>{"".join(f"<th>{escape(h)}</th>" for h in table.headers)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<ul class="protocol">{"".join(f"<li>{escape(line)}</li>" for line in table.footer)}</ul></section>'
    )


def _samples(records: Sequence[Record]) -> Iterable[str]:
    """One section for each set of noises, its generators side by side; one for sets of images."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        if "grid" in r:
            groups.setdefault(repr((r["grid"].get("seeds"), r["grid"]["labels"])) if r["grid"].get("seeds") else "", []).append(r)
    for key, group in sorted(groups.items(), key=lambda item: item[0] == ""):
        grid = group[0]["grid"]
        order = ", in the order of the classes asked for" if grid["labels"] else ""
        if key:
            first, last = grid["seeds"]
            lead = f"The same {grid['n']} noises in every column, seeds {first} to {last}: the first ones, not chosen{order}."
            yield _section("Samples from equal noise", lead, f'<div class="grids">{"".join(_columns(group))}</div>')
        else:
            figures = "".join(_figure(r["grid"], r["grid"]["png"], r["name"], "evenly spaced, not chosen") for r in group)
            yield _section("Images", "From the sets of images in the table.", f'<div class="grids">{figures}</div>')


def _columns(group: Sequence[Record]) -> Iterable[str]:
    """Teachers first. The teacher that came with a student's grid stands in where the table has no row for it."""
    teachers = [r for r in group if r["x"]["kind"] == "teacher"]
    shown = {r["grid"]["png"] for r in teachers}
    columns = sorted(teachers, key=lambda r: -r["x"]["nfe"])
    for r in group:
        spare = r["grid"].get("teacher_png")
        if spare and spare not in shown:
            shown.add(spare)
            yield _figure(r["grid"], spare, r["grid"]["teacher"], "teacher")
    for r in [*columns, *(r for r in group if r not in columns)]:
        calls = r["x"]["nfe"]
        yield _figure(r["grid"], r["grid"]["png"], r["name"], f"{r['x']['kind']}, {calls} network call{'s' * (calls != 1)}")


def _figure(grid: dict[str, Any], png: str, name: str, what: str) -> str:
    rows = -(-grid["n"] // grid["columns"])
    return (
        f'<figure class="card"><div class="tilesheet" style="--columns:{grid["columns"]};--rows:{rows}">'
        f'<img alt="{grid["n"]} images: {escape(name)}" src="data:image/png;base64,{escape(png)}"></div>'
        f"<figcaption>{escape(name)}<span>{escape(what)}</span></figcaption></figure>"
    )


def _training(curves: Sequence[Curves]) -> str:
    losses = [Series(_named(c, key, curves), *_xy(points), smooth=True) for c in curves for key, points in c.losses.items()]
    charts = [_chart("Training loss", "As logged (thin) and smoothed (thick).", losses, "loss")]
    for key in dict.fromkeys(key for c in curves for key in c.scores):
        series = [Series(c.name, *_xy(c.scores[key]), marks=True) for c in curves if key in c.scores]
        what = "Fréchet distance" if key == "fd" else key
        charts.append(
            _chart(
                f"{what[:1].upper()}{what[1:]} during training",
                "On the recipe's own n and seeds: not comparable with the table.",
                series,
                what,
            )
        )
    charts = [chart for chart in charts if chart]
    if not charts:
        return ""
    return _section("Training", f"From {', '.join(c.name for c in curves)}.", f'<div class="charts">{"".join(charts)}</div>')


def _named(run: Curves, key: str, curves: Sequence[Curves]) -> str:
    names = [run.name] if len(curves) > 1 else []
    return ": ".join([*names, key]) if len(run.losses) > 1 or not names else run.name


def _xy(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _chart(title: str, what: str, series: Sequence[Series], y_label: str) -> str:
    log = all(y > 0 for s in series for y in s.y) and y_label != "accuracy"
    svg = line_chart(series, "images seen", y_label, log_y=log)
    if not svg:
        return ""
    legend = "".join(f'<li><i class="s{i % COLOURS}"></i>{escape(s.name)}</li>' for i, s in enumerate(series)) if len(series) > 1 else ""
    keys = f'<ul class="legend">{legend}</ul>' if legend else ""
    return f'<div class="card chart"><h3>{escape(title)}</h3><p>{escape(what)}{" Logarithmic axis." if log else ""}</p>{keys}{svg}</div>'


def _classes(records: Sequence[Record]) -> str:
    scored = [r for r in records if "accuracy" in r["metrics"]]
    classes = list(dict.fromkeys(c for r in scored for c in r["metrics"]["accuracy"]["per_class"]))
    if not classes or len(classes) > 40:
        return ""
    rows = []
    for r in scored:
        per_class = r["metrics"]["accuracy"]["per_class"]
        cells = "".join(_cell(per_class.get(c)) for c in classes)
        rows.append(f"<tr><td>{escape(r['name'])}</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(c)}</th>" for c in classes)
    features = ", ".join(dict.fromkeys(r["protocol"]["features"].partition("/")[0] for r in scored))
    return _section(
        "Accuracy by class", f"Per cent of the images of each class that the classifier of the extractor {features} takes for that class.",
        f'<div class="card scroll"><table class="heat"><thead><tr><th>class</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )  # fmt: skip


def _cell(value: float | None) -> str:
    if value is None:
        return "<td>–</td>"
    return f'<td class="cell" style="--v:{min(max(4 * value - 3, 0), 1):.3f}">{100 * value:.1f}</td>'


def _details(records: Sequence[Record]) -> str:
    return _section(
        "How each number was made",
        "The command that repeats it, the weights it used and the machine it ran on.",
        "".join(_about(r) for r in records),
    )


def _about(r: Record) -> str:
    x, env = r["x"], r["env"]
    rows = [
        ("command", f"<code>{escape(r.get('command', 'not recorded'))}</code>"),
        ("protocol", escape(protocol_line(r["protocol"]))),
        ("file", f"<code>{escape(x['source'])}</code>" + (f", sha256 <code>{escape(x['sha256'])}</code>" if x.get("sha256") else "")),
        ("parameters", f"{x['parameters']:,}" if x.get("parameters") else ""),
        ("licence", escape(x.get("licence") or "")),
        ("runs", " · ".join(number(v) for v in r["metrics"]["fd"]["runs"]) if len(r["metrics"].get("fd", {}).get("runs", [])) > 1 else ""),
        ("took", f"{r['timings']['seconds']:,.1f} s, of these {r['timings']['generating']:,.1f} s generating"),
        (
            "machine",
            escape(f"{env.get('gpu') or env['cpu']}, {env['cores']} cores, {env['threads']} threads, torch {env['torch']}, d2o {r['d2o']}"),
        ),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows if value)
    return f'<details class="card"><summary>{escape(r["name"])}</summary><dl>{items}</dl></details>'


def _section(title: str, lead: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{body}</section>'
