"""Results side by side, as plain cells: the table of the terminal, of files and of the report, each row with the
protocol behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from d2o.evaluation.protocol import protocol_line
from d2o.reports.cells import (
    COSTS,
    DEFAULTS,
    NONE,
    MetricEntry,
    Result,
    comparable,
    cost_text,
    has_protocol,
    heading,
    magnitude,
    metrics,
    milliseconds,
    number,
    paper_of,
    printed,
    printed_decimals,
    rank,
    value_text,
)
from d2o.reports.legend import legend


@dataclass(frozen=True)
class Comparison:
    """`rows` of strings under `headers`; `footer` lines state protocols (the first `protocols` of them), marks and
    warnings.

    `columns` say what each column is: name, n, metric, paper, ...; `best` are the cells (row, column) to be set in
    bold.
    """

    headers: list[str]
    rows: list[list[str]]
    footer: list[str]
    columns: tuple[str, ...] = ()
    best: frozenset[tuple[int, int]] = frozenset()
    protocols: int = 0


@dataclass(frozen=True)
class Column:
    """`cells` has one text for each record; `best` the rows to be set in bold."""

    kind: str
    header: str
    cells: list[str]
    best: frozenset[int] = frozenset()


def results_table(records: Sequence[Result]) -> Comparison:
    """One row for each record and one column for each metric that any of them has (one for each label, where results of
    one metric differ in it); columns that say nothing are left out. Rows measured under different protocols carry
    different letters, explained in the footer.

    In bold: the best of a column among students whose protocols are equal in every field, where there are at least two
    of them.
    """
    lines = list(dict.fromkeys(protocol_line(r["protocol"]) for r in records if has_protocol(r)))
    letters = {line: _letter(i) for i, line in enumerate(lines)}
    nfe, latency = _column(records, "nfe", "NFE", _nfe), _column(records, "latency", "latency", _latency)
    columns = [
        Column("name", "name", [r["name"] for r in records]),
        *_words(records),
        _column(records, "n", "n", _n),
        *_metric_columns(records),
        _column(records, "distance", "to teacher", _distance),
        nfe,
        _column(records, "paper", _beside(nfe), lambda r: _printed(r, "nfe")),
        _column(records, "parameters", "params", _parameters),
        _column(records, "speed", "samples/s", _speed),
        latency,
        _column(
            records,
            "paper",
            _beside(latency),
            lambda r: milliseconds(1000 * paper_of(r)["seconds"][0]) if "seconds" in paper_of(r) else NONE,
        ),
        _column(records, "preset", "preset", lambda r: (r.get("preset") or {}).get("name", NONE)),
        _column(
            records,
            "protocol",
            "protocol",
            lambda r: letters[protocol_line(r["protocol"])] if has_protocol(r) else NONE,
        ),
    ]
    told = [c for c in columns if c.kind in ("name", "n") or _tells(c)]
    if len(lines) < 2:
        told = [c for c in told if c.kind != "protocol"]
    best = frozenset((row, i) for i, c in enumerate(told) for row in c.best)
    footer = (
        [f"{letters[line]}: {line}" for line in lines] if len(lines) > 1 else [f"protocol: {line}" for line in lines]
    )
    return Comparison(
        [c.header for c in told],
        [list(cells) for cells in zip(*(c.cells for c in told), strict=True)],
        [*footer, *legend(records, bold=bool(best))],
        tuple(c.kind for c in told),
        best,
        len(lines),
    )


def fold(table: Comparison, width: int, gap: int = 3, names: int | None = None) -> list[Comparison]:
    """The table in pieces that fit into `width` characters, each with the names; the footer under the last. A column
    that is too wide alone
    stands alone. `names`: the width of the first column, where its texts are wrapped."""
    sizes = [max(map(len, cells)) + gap for cells in zip(table.headers, *table.rows, strict=True)]
    sizes[0] = sizes[0] if names is None else names
    pieces: list[list[int]] = [[]]
    used = sizes[0]
    for i in range(1, len(sizes)):
        if pieces[-1] and used + sizes[i] > width:
            pieces.append([])
            used = sizes[0]
        pieces[-1].append(i)
        used += sizes[i]
    tables = []
    for piece in pieces:
        kept = [0, *piece]
        best = frozenset((row, kept.index(i)) for row, i in table.best if i in kept)
        last = piece is pieces[-1]
        tables.append(
            Comparison(
                [table.headers[i] for i in kept],
                [[row[i] for i in kept] for row in table.rows],
                table.footer if last else [],
                tuple(table.columns[i] for i in kept),
                best,
                table.protocols if last else 0,
            )
        )
    return tables


def _tells(column: Column) -> bool:
    """Presets and protocols that all rows share are told below, not in each row."""
    different = set(column.cells)
    return len(different) > 1 if column.kind in ("preset", "protocol") else different != {NONE}


def _beside(column: Column) -> str:
    """The heading of what the paper prints beside it."""
    return "paper" if _tells(column) else f"{column.header}, paper"


def _column(records: Sequence[Result], kind: str, header: str, cell: Callable[[Result], str]) -> Column:
    return Column(kind, header, [cell(r) for r in records])


def metric_columns(records: Sequence[Result]) -> dict[tuple[str, str], dict[int, MetricEntry]]:
    """(key, label) -> {row: metric}, in the order in which they are shown."""
    found: dict[tuple[str, str], dict[int, MetricEntry]] = {}
    for row, r in enumerate(records):
        for key, metric in metrics(r):
            found.setdefault((key, metric["label"]), {})[row] = metric
    return dict(sorted(found.items(), key=lambda item: rank(item[0][0])))


def best_rows(records: Sequence[Result], key: str, column: dict[int, MetricEntry]) -> frozenset[int]:
    """The rows of a metric's column that are best among students they may be compared with."""
    groups: dict[str, list[int]] = {}
    for row, metric in column.items():
        if records[row]["x"]["kind"] == "student" and metric["better"] and not metric.get("small_n"):
            groups.setdefault(comparable(records[row], key, metric), []).append(row)
    best: set[int] = set()
    for rows in groups.values():
        if len(rows) > 1:
            pick = min if column[rows[0]]["better"] == "lower" else max
            top = pick(column[row]["value"] for row in rows)
            best |= {row for row in rows if column[row]["value"] == top}
    return frozenset(best)


def _metric_columns(records: Sequence[Result]) -> list[Column]:
    papers, rows = [paper_of(r) for r in records], range(len(records))
    columns: list[Column] = []
    shown: set[tuple[int, str]] = set()
    for (key, _), column in metric_columns(records).items():
        # a row without this metric has its printed number in the first column of the key
        mine = [
            row
            for row in rows
            if key in papers[row] and (row, key) not in shown and (row in column or key not in records[row]["metrics"])
        ]
        shown |= {(row, key) for row in mine}
        percent = any(m.get("percent") for m in column.values())
        places = {row: 0 if percent else printed_decimals(papers[row][key][0]) for row in mine}
        cells = [value_text(column[row], places.get(row, 0)) if row in column else NONE for row in rows]
        columns.append(Column("metric", heading(next(iter(column.values()))), cells, best_rows(records, key, column)))
        if mine:
            cells = [printed(*papers[row][key], percent) if row in mine else NONE for row in rows]
            columns.append(Column("paper", "paper", cells))
    measured = {key for r in records for key, _ in metrics(r)} | {"nfe", "seconds"}
    for key in dict.fromkeys(key for paper in papers for key in paper if key not in measured):
        columns.append(_column(records, "paper", COSTS.get(key, f"{key}, paper"), partial(_printed, key=key)))
    return columns


def _words(records: Sequence[Result]) -> list[Column]:
    """What a table says of its rows in words."""
    keys = dict.fromkeys(key for r in records for key in r.get("about") or {})
    return [Column("about", key, [(r.get("about") or {}).get(key, NONE) for r in records]) for key in keys]


def _printed(record: Result, key: str) -> str:
    found = paper_of(record).get(key)
    if found is not None and key in COSTS:
        return cost_text(key, found[0])
    return NONE if found is None else printed(*found, percent=bool(DEFAULTS.get(key, {}).get("percent")))


def _letter(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else str(i)


def _n(record: Result) -> str:
    if not has_protocol(record):
        return str(record.get("status", NONE))
    n = record["protocol"]["n_gen"]
    return NONE if n is None else f"{n:,}"


def _nfe(record: Result) -> str:
    x = record["x"]
    if x.get("nfe") is None:
        return NONE
    forwards = x.get("forwards", x["nfe"])
    return f"{x['nfe']}" + (f" ({forwards} forwards)" if forwards != x["nfe"] else "")


def _parameters(record: Result) -> str:
    return magnitude(record["x"]["parameters"]) if record["x"].get("parameters") else NONE


def _speed(record: Result) -> str:
    speed = record["metrics"].get("speed") or {}
    return number(speed["samples_per_s"]) if speed.get("samples_per_s") is not None else NONE


def _latency(record: Result) -> str:
    speed = record["metrics"].get("speed") or {}
    return milliseconds(speed["latency_ms"]) if speed.get("latency_ms") is not None else NONE


def _distance(record: Result) -> str:
    distance = record["metrics"].get("distance")
    return NONE if distance is None else number(distance["rmse"])
