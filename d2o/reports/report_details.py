"""The section of report.html that says how each number was made."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from d2o.evaluation.protocol import protocol_line
from d2o.inputs import JsonObject
from d2o.reports.cells import (
    MetricEntry,
    Result,
    has_protocol,
    heading,
    machine,
    memory,
    metrics,
    milliseconds,
    number,
    paper_of,
    printed,
    settings,
    value_text,
)


def details(records: Sequence[Result]) -> str:
    return (
        '<section><h2>How each number was made</h2><p class="lead">The command that repeats it, the weights it used and'
        " the machine it ran on."
        f"</p>{''.join(_about(r) for r in records if has_protocol(r))}</section>"
    )


def _about(r: Result) -> str:
    x, env = r["x"], r["env"]
    rows = [
        ("command", f"<code>{escape(r.get('command', 'not recorded'))}</code>"),
        ("protocol", escape(protocol_line(r["protocol"]))),
        ("preset", escape(_preset(r.get("preset") or {}))),
        (
            "file",
            f"<code>{escape(x['source'])}</code>"
            + (f", sha256 <code>{escape(x['sha256'])}</code>" if x.get("sha256") else ""),
        ),
        ("parameters", f"{x['parameters']:,}" if x.get("parameters") else ""),
        ("licence", escape(x.get("licence") or "")),
        *((escape(heading(m)), escape(_metric(m, paper_of(r).get(key)))) for key, m in metrics(r)),
        ("speed", escape(_speed(r["metrics"].get("speed") or {}))),
        ("latency", escape(_latency(r["metrics"].get("speed") or {}))),
        ("peak memory", memory(size) if (size := (r["metrics"].get("speed") or {}).get("peak_memory_bytes")) else ""),
        ("took", f"{r['timings']['seconds']:,.1f} s, of these {r['timings']['generating']:,.1f} s generating"),
        ("machine", escape(f"{machine(r)}, {env['cores']} cores, torch {env['torch']}, d2o {r['d2o']}")),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows if value)
    return f'<details class="card"><summary>{escape(r["name"])}</summary><dl>{items}</dl></details>'


def _preset(preset: JsonObject) -> str:
    """Its name, paper and whatever else it says, as far as that is one line."""
    rest = (
        f"{key} {value}"
        for key, value in preset.items()
        if key not in ("name", "paper") and isinstance(value, (str, int, float))
    )
    return " · ".join(str(part) for part in (preset.get("name"), preset.get("paper"), *rest) if part)


def _metric(m: MetricEntry, paper: tuple[float, float | None] | None) -> str:
    parts = [value_text(m)]
    runs = m["runs"]
    if len(runs) > 1:
        parts.append("runs " + ", ".join(number(v) for v in runs))
    if m.get("report") == "min" and m["std"] is not None:
        parts.append(f"deviation of the runs {number(m['std'])}")
    parts += [f"{key} {value:,}" if type(value) is int else f"{key} {value}" for key, value in settings(m).items()]
    if paper is not None:
        change = f" ({100 * (m['value'] / paper[0] - 1):+.1f} %)" if paper[0] else ""
        parts.append(f"the paper prints {printed(*paper, bool(m.get('percent')))}{change}")
    return " · ".join(parts)


def _speed(speed: JsonObject) -> str:
    if speed.get("samples_per_s") is None:
        return ""
    parts = [f"{number(speed['samples_per_s'])} images/s, batch {speed['batch']}"]
    return " · ".join([*parts, *([str(speed["dtype"])] if speed.get("dtype") else [])])


def _latency(speed: JsonObject) -> str:
    """Of one image: the median, the slowest tenth, and what it is spent on."""
    if speed.get("latency_ms") is None:
        return ""
    spent = [
        f"{what} {milliseconds(speed[key])}"
        for key, what in (("text_ms", "text"), ("network_ms", "network"), ("decode_ms", "decoder"))
        if speed.get(key) is not None
    ]
    parts = [f"{milliseconds(speed['latency_ms'])} (median)"]
    if speed.get("latency_p90_ms") is not None:
        parts.append(f"nine of ten within {milliseconds(speed['latency_p90_ms'])}")
    return " · ".join(parts) + (f"; {', '.join(spent)}" if spent else "")
