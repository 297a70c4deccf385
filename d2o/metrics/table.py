"""Results side by side, as plain cells: the table of the terminal and of the report, each row with the protocol behind its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2o.metrics.protocol import protocol_line

NONE = "–"
SMALL_N = "†"


@dataclass(frozen=True)
class Table:
    """`rows` of strings under `headers`; `footer` lines state protocols, what the columns mean, and warnings."""

    headers: list[str]
    rows: list[list[str]]
    footer: list[str]


def results_table(records: Sequence[dict[str, Any]]) -> Table:
    """One row for each record; columns that say nothing are left out. Rows measured under different protocols carry different letters,
    explained in the footer."""
    labels = list(dict.fromkeys(r["metrics"]["fd"]["label"] for r in records if "fd" in r["metrics"]))
    lines = list(dict.fromkeys(protocol_line(r["protocol"]) for r in records))
    letters = {line: _letter(i) for i, line in enumerate(lines)}
    headers = ["name", "n", labels[0] if len(labels) == 1 else "FD", "accuracy", "NFE", "samples/s", "to teacher", "protocol"]
    rows = [
        [r["name"], _count(r["protocol"]["n_gen"]), _fd(r, named=len(labels) > 1), _accuracy(r), _nfe(r), _speed(r), _distance(r)]
        + [letters[protocol_line(r["protocol"])]]
        for r in records
    ]
    footer = [f"{letters[line]}: {line}" for line in lines]
    if len(lines) == 1:
        footer, rows = [f"protocol: {lines[0]}"], [[*row[:-1], NONE] for row in rows]
    told = [i for i in range(len(headers)) if i < 2 or any(row[i] != NONE for row in rows)]
    return Table([headers[i] for i in told], [[row[i] for i in told] for row in rows], [*footer, *_legend(records)])


def _legend(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    fds = [r["metrics"]["fd"] for r in records if "fd" in r["metrics"]]
    if any(fd["small_n"] for fd in fds):
        lines.append(f"{SMALL_N} fewer images than features: the distance is far too large and comparable with nothing")
    if any(fd["std"] is not None for fd in fds):
        lines.append("±: standard deviation over runs with disjoint seeds")
    if len({(r["protocol"]["n_gen"], r["protocol"]["n_ref"]) for r in records if "fd" in r["metrics"]}) > 1:
        lines.append("a Fréchet distance falls as n grows: compare rows of equal n only")
    distances = [r["metrics"]["distance"] for r in records if "distance" in r["metrics"]]
    for d in {(d["teacher"]["source"], d["teacher"]["solver"], d["teacher"]["steps"], d["n"]): d for d in distances}.values():
        t = d["teacher"]
        lines.append(f"to teacher: distance to {t['source']} ({t['solver']}, {t['steps']} steps) from equal noise: "
                     f"rms per pixel, values in [-1, 1], {d['n']:,} images")  # fmt: skip
        if "samples_per_s" in t:
            lines[-1] += f"; the teacher makes {number(t['samples_per_s'])} images/s with {t['nfe']} network calls each"
    speeds = {
        (r["env"].get("gpu") or r["env"]["cpu"], r["env"]["threads"], r["metrics"]["speed"]["batch"]) for r in records if "speed" in r["metrics"]
    }
    for device, threads, batch in sorted(speeds):
        lines.append(f"samples/s of generating alone, batch {batch}: {device}, {threads} thread{'s' * (threads != 1)}")
    lines += dict.fromkeys(f"note: {note}" for r in records for note in r["notes"])
    return lines


def _letter(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else str(i)


def number(value: float) -> str:
    """Three significant digits: 0.0123, 1.20, 12.3, 1,234."""
    return "0" if value == 0 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _count(n: int | None) -> str:
    return NONE if n is None else f"{n:,}"


def _fd(record: dict[str, Any], named: bool) -> str:
    fd = record["metrics"].get("fd")
    if fd is None:
        return NONE
    text = number(fd["value"]) + (f" ± {number(fd['std'])}" if fd["std"] is not None else "") + (SMALL_N if fd["small_n"] else "")
    return f"{fd['label']} {text}" if named else text


def _accuracy(record: dict[str, Any]) -> str:
    accuracy = record["metrics"].get("accuracy")
    return NONE if accuracy is None else f"{100 * accuracy['value']:.1f} %"


def _nfe(record: dict[str, Any]) -> str:
    x = record["x"]
    if x.get("nfe") is None:
        return NONE
    return f"{x['nfe']}" + (f" ({x['forwards']} forwards)" if x["forwards"] != x["nfe"] else "")


def _speed(record: dict[str, Any]) -> str:
    speed = record["metrics"].get("speed")
    return NONE if speed is None else number(speed["samples_per_s"])


def _distance(record: dict[str, Any]) -> str:
    distance = record["metrics"].get("distance")
    return NONE if distance is None else number(distance["rmse"])
