"""report.html: results, samples from equal noise, nearest training images and training curves on one self-contained
page. Nothing is fetched, nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from d2o.errors import UserError
from d2o.evaluation.protocol import protocol_line
from d2o.interop.outputs import check_output
from d2o.interop.safetensors_io import atomic_write
from d2o.reports.cells import (
    ARROWS,
    Result,
    machine,
    metrics,
    number,
    paper_of,
    printed,
    value_text,
)
from d2o.reports.comparison import Comparison, fold, results_table
from d2o.reports.curves import Curves, read_curves
from d2o.reports.report_charts import WORDS, by_class, comparison, training
from d2o.reports.report_details import details
from d2o.reports.report_pictures import neighbours, samples
from d2o.version import __version__

STYLE = Path(__file__).with_name("report.css")
MARK = '<meta name="generator" content="d2o'
WIDTH, NAMES = 122, 28
"""Characters of a table in the text's width, and of the names in it: what does not fit folds."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    path: str | Path, records: Sequence[Result], runs: Sequence[str | Path] = (), title: str = "d2o report"
) -> None:
    """Write the page (atomically). UserError: `runs` without metrics.jsonl, or `path` holds a page that isn't d2o's."""
    check_report_target(path)
    atomic_write(path, render(records, [read_curves(run) for run in runs], title))


def check_report_target(path: str | Path) -> None:
    """UserError if writing to `path` would overwrite something else, or cannot work."""
    check_output(path, folder=False)
    path = Path(path)
    if path.exists() and path.stat().st_size and MARK.encode() not in path.read_bytes()[:4096]:
        raise UserError(
            f"{path} exists and is not a report of d2o: it is not overwritten", "choose another name for --report"
        )


def render(records: Sequence[Result], curves: Sequence[Curves] = (), title: str = "d2o report") -> str:
    """The whole page."""
    sections = [
        _results(records),
        comparison(records),
        *samples(records),
        neighbours(records),
        training(curves),
        by_class(records),
        details(records),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK} {__version__}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(records))}</p></header>\n{_tiles(records)}\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Made by d2o {__version__}. This page is complete in itself: it loads nothing and runs no"
        " script.</footer>\n</main></body></html>\n"
    )


def _subtitle(records: Sequence[Result]) -> str:
    students = [r for r in records if r["x"]["kind"] == "student"]
    makers = dict.fromkeys(r["x"]["teacher"] for r in students if r["x"].get("teacher"))
    what = f"{len(records)} result{'s' * (len(records) != 1)}"
    if makers:
        what = f"One-step student{'s' * (len(students) != 1)} of the teacher {', '.join(makers)}"
    return " · ".join(
        [what, *dict.fromkeys(f"{machine(r)}, torch {r['env']['torch']}" for r in records if r.get("env"))]
    )


def _tiles(records: Sequence[Result]) -> str:
    """The best student beside the teacher, in a few numbers; only numbers of one protocol stand beside each other."""
    keys = [key for r in records if r["x"]["kind"] == "student" for key, m in metrics(r) if m["better"]]
    if not keys:
        return ""
    key = keys[0]
    scored = [(r, m) for r in records for k, m in metrics(r) if k == key]
    student, metric = min(
        ((r, m) for r, m in scored if r["x"]["kind"] == "student"),
        key=lambda pair: (1 if pair[1]["better"] == "lower" else -1) * pair[1]["value"],
    )
    same = protocol_line(student["protocol"])
    teachers = [
        (r, m)
        for r, m in scored
        if r["x"]["kind"] == "teacher" and protocol_line(r["protocol"]) == same and m["label"] == metric["label"]
    ]
    teachers.sort(key=lambda pair: -pair[0]["x"]["nfe"])
    teacher = teachers[0][0] if teachers else None
    beside = []
    for i, (_, m) in enumerate(teachers[:1] + [t for t in teachers[1:] if t[0]["x"]["nfe"] == 1][:1]):
        beside.append(f"teacher{' called once' if i else ''} {value_text({**m, 'std': None})}")
    if paper := paper_of(student).get(key):
        beside.append(f"paper {printed(*paper, bool(metric.get('percent')))}")
    n = f"n = {student['protocol']['n_gen']:,}" if student["protocol"]["n_gen"] else ""
    name = f"{metric['label']}, {WORDS[metric['better']]}"
    value, _, spread = value_text(metric).partition(" ± ")
    beside = [f"± {spread}"] * bool(spread) + beside
    tiles = [(name, value, " · ".join(beside) or n)]
    if teacher is not None:
        tiles.insert(
            0, ("Network calls per image", f"{teacher['x']['nfe']} → {student['x']['nfe']}", "teacher → student")
        )
        ours, theirs = ((r["metrics"].get("speed") or {}).get("samples_per_s") for r in (student, teacher))
        if ours and theirs and machine(student) == machine(teacher):
            tiles.append(
                ("Sampling speed", f"{number(ours / theirs)}×", f"{number(ours)} images/s · teacher {number(theirs)}")
            )
    if key != "accuracy" and (accuracy := dict(metrics(student)).get("accuracy")):
        theirs = dict(metrics(teacher)).get("accuracy") if teacher else None
        tiles.append(("Class accuracy", value_text(accuracy), f"teacher {value_text(theirs)}" if theirs else ""))
    cards = "".join(
        f'<div class="card tile"><div class="what">{escape(what)}</div><div class="value">{escape(value)}</div>'
        f'<div class="beside">{escape(also)}</div></div>'
        for what, value, also in tiles
    )
    return f'<div class="tiles">{cards}</div>'


def _results(records: Sequence[Result]) -> str:
    table = results_table(records)
    pieces = "".join(_table(records, piece) for piece in fold(table, WIDTH, names=NAMES))
    return (
        '<section><h2>Results</h2><p class="lead">Numbers are comparable only under one protocol: equal n, features,'
        " reference and pixel handling, all stated below. A Fréchet distance (FD) is named by the network whose"
        f' features it compares.</p><div class="card">{pieces}</div><ul'
        f' class="protocol">{"".join(_footnote(line) for line in table.footer)}</ul></section>'
    )


def _table(records: Sequence[Result], table: Comparison) -> str:
    """A piece of the table. On a narrow page its rows become lists, in which each cell says what it is."""
    heads = "".join(
        f'<th scope="col"{_class(kind)}>{_arrowed(h)}</th>'
        for h, kind in zip(table.headers, table.columns, strict=True)
    )
    rows = []
    for i, (r, cells) in enumerate(zip(records, table.rows, strict=True)):
        kind = escape(r["x"]["kind"])
        name = f'<th scope="row">{escape(cells[0])}<span class="kind">{kind}</span></th>'
        rest = "".join(
            f'<td{_class(table.columns[j])} data-label="{escape(table.headers[j])}">'
            f"{f'<strong>{escape(cell)}</strong>' if (i, j) in table.best else escape(cell)}</td>"
            for j, cell in enumerate(cells)
            if j
        )
        rows.append(f'<tr class="{kind}">{name}{rest}</tr>')
    return f'<table class="results"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _class(kind: str) -> str:
    return ' class="paper"' if kind == "paper" else ""


def _arrowed(header: str) -> str:
    """Breaks before a bracket only; arrows are read out as words."""
    arrow = ""
    for better, sign in ARROWS.items():
        if header.endswith(f" {sign}"):
            header, arrow = (
                header[:-2],
                f' <span title="{WORDS[better]}" role="img" aria-label="{WORDS[better]}">{sign}</span>',
            )
    name, bracket, rest = escape(header).partition("(")
    return f"<span>{name}</span><wbr><span>({rest}{arrow}</span>" if bracket else f"<span>{name}{arrow}</span>"


def _footnote(line: str) -> str:
    return f"<li{' class=warning' if line.startswith('not comparable') else ''}>{escape(line)}</li>"
