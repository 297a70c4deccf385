"""The lines below a table of results: what its marks and columns mean, and which of its rows must not be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2o.inputs import JsonObject
from d2o.reports.cells import (
    CITED,
    FAILED,
    NOT_RUN,
    SMALL_N,
    Result,
    error_of,
    has_protocol,
    machine,
    metrics,
    number,
    paper_of,
)

ERRORS = {
    "runs": "standard deviation over runs with disjoint seeds",
    "bootstrap": "standard deviation over bootstrap resamples of the images",
    "splits": "standard deviation over splits of the images",
    "subsets": "standard deviation over subsets of the images",
    "seeds": "standard deviation over trainings with other seeds",
}
BOLD = "the best of the students that share a protocol"


def legend(records: Sequence[Result], bold: bool = False) -> list[str]:
    """Warnings first, then what ±, the marks, the columns and the presets mean, then the records' own notes."""
    papers, notes = _papers(records), dict.fromkeys(f"note: {n}" for r in records for n in r["notes"])
    records = [r for r in records if has_protocol(r)]
    lines = [*_warnings(records), *_errors(records), *_presets(records), *papers]
    if bold:
        lines.append(f"bold: {BOLD}")
    return [
        *lines,
        *_own_n(records),
        *_relative(records),
        *_distances(records),
        *_speeds(records),
        *notes,
    ]


def _warnings(records: Sequence[Result]) -> list[str]:
    lines = []
    if any(m.get("small_n") for r in records for _, m in metrics(r)):
        lines.append(f"{SMALL_N} fewer images than features: the distance is far too large and comparable with nothing")
    compared = [r for r in records if any(m["better"] for k, m in metrics(r) if k != "accuracy")]
    counts = _differing(compared, ("n_gen", "n_ref"))
    if counts:
        each = "; ".join(f"{_n(a)} against {_n(b)}" for a, b in counts)
        lines.append(
            f"not comparable, different n ({each}): a Fréchet distance falls as n grows; compare rows of equal n only"
        )
    names = _differing(compared, ("features", "weights_sha256"))
    if names:
        each = "; ".join(f"{a}, weights {b[:12]}" if b else str(a) for a, b in names)
        lines.append(f"not comparable, different extractors ({each})")
    for field, what in (("resize", "resizes"), ("quantize", "ways to 8 bits"), ("ref", "references")):
        values = [v for (v,) in _differing(compared, (field,)) if v not in (None, "", "as stored")]
        if len(values) > 1:
            lines.append(f"not comparable, different {what} ({'; '.join(map(str, values))})")
    return lines


def _differing(records: Sequence[Result], fields: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """The different values of these protocol fields; none where all are equal."""
    values = list(dict.fromkeys(tuple(_plain(r["protocol"].get(f)) for f in fields) for r in records))
    return values if len(values) > 1 else []


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _n(n: object) -> str:
    return f"{n:,}" if isinstance(n, int) else "not stated"


def _errors(records: Sequence[Result]) -> list[str]:
    kinds: dict[str, dict[str, None]] = {}
    for r in records:
        for _, m in metrics(r):
            if error_of(m) is not None:
                kinds.setdefault(m.get("error") or "runs", {})[m["label"]] = None
    lines = []
    for kind, labels in kinds.items():
        of = f" of {', '.join(labels)}" if len(kinds) > 1 else ""
        lines.append(f"±{of}: {ERRORS.get(kind, kind)}")
    least = dict.fromkeys(m["label"] for r in records for _, m in metrics(r) if m.get("report") == "min")
    if least:
        lines.append(
            f"{', '.join(least)}: the best of the runs, as EDM reports it: better than a single run is on average"
        )
    return lines


def _presets(records: Sequence[Result]) -> list[str]:
    presets = {r["preset"]["name"]: r["preset"].get("paper") for r in records if r.get("preset")}
    return [f"preset {name}" + (f": the protocol of {paper}" if paper else "") for name, paper in presets.items()]


def _papers(records: Sequence[Result]) -> list[str]:
    others = [r for r in records if not has_protocol(r)]
    sources = {
        status: "; ".join(dict.fromkeys(r["x"]["source"] for r in others if r.get("status") == status))
        for status in (None, CITED, NOT_RUN, FAILED)
    }
    words = {
        None: "rows without n: quoted from {}, not measured here",
        CITED: "cited: quoted from {}, not measured here",
        NOT_RUN: "not run: d2o makes what this row measures, and it is not here; its note says how",
        FAILED: "failed: it could not be measured; its note says why",
    }
    lines = (
        ["paper: the number that the paper prints for the row, not measured here"]
        if any(map(paper_of, records))
        else []
    )
    return lines + [text.format(sources[status]) for status, text in words.items() if sources[status]]


def _own_n(records: Sequence[Result]) -> list[str]:
    """Metrics over other numbers of images than their row's n."""
    labels: dict[int, dict[str, None]] = {}
    for r in records:
        for key, m in metrics(r):
            n = m.get("n")
            if isinstance(n, int) and key != "accuracy" and n != r["protocol"]["n_gen"]:
                labels.setdefault(n, {})[m["label"]] = None
    return [f"{', '.join(names)}: over {n:,} images" for n, names in labels.items()]


def _distances(records: Sequence[Result]) -> list[str]:
    lines = []
    distances = [r["metrics"]["distance"] for r in records if "distance" in r["metrics"]]
    for d in {
        (d["teacher"]["source"], d["teacher"].get("solver"), d["teacher"].get("steps"), d["n"]): d for d in distances
    }.values():
        t = d["teacher"]
        line = (
            f"to teacher: distance to {t['source']} ({_sampled(t)}) from equal noise: "
            f"rms per pixel, values in [-1, 1], {d['n']:,} images"
        )
        if "samples_per_s" in t:
            line += f"; the teacher makes {number(t['samples_per_s'])} images/s with {t['nfe']} network calls each"
        lines.append(line)
    return lines


def _sampled(teacher: JsonObject) -> str:
    if teacher.get("solver") is None:
        return f"a student of {teacher['nfe']} call{'s' * (teacher['nfe'] != 1)}"
    return f"{teacher['solver']}, {teacher['steps']} steps"


def _relative(records: Sequence[Result]) -> list[str]:
    """What the distances to a teacher's images are taken to."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for r in records:
        for key, m in metrics(r):
            if key.startswith("rel-") and m.get("to"):
                seeds = f"seeds {m['to_seeds']}" if "to_seeds" in m else "the same seeds"
                found.setdefault((m["label"], seeds), {})[m["to"]] = None
    return [f"{label}: to the images of {', '.join(sources)} from {seeds}" for (label, seeds), sources in found.items()]


def _speeds(records: Sequence[Result]) -> list[str]:
    timed = [(machine(r), r["metrics"]["speed"]) for r in records if "speed" in r["metrics"]]
    where = dict.fromkeys((s["batch"], _dtype(s), who) for who, s in timed)
    lines = [f"samples/s of generating alone, batch {batch}{dtype}: {who}" for batch, dtype, who in sorted(where)]
    if any("latency_ms" in s for _, s in timed):
        lines.append("latency: median time of one image alone (batch 1), on the same machine")
    return lines


def _dtype(speed: JsonObject) -> str:
    return f", {speed['dtype']}" if speed.get("dtype") else ""
