"""The table of results as a file for other programs: GitHub markdown, CSV with every digit, or LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.outputs import check_output
from d2o.interop.safetensors_io import atomic_write
from d2o.reports.cells import ARROWS, NONE, Result, metrics, paper_of
from d2o.reports.comparison import results_table
from d2o.version import __version__

MARKDOWN_MARK = "<!-- results: written by d2o"
TEX_MARK = "% results: written by d2o"
CSV_FIRST = ("name", "kind", "source", "sha256", "teacher", "parameters", "nfe", "forwards")
"""The columns that every CSV of ours begins with; the metrics and the protocol follow."""
METRIC_FIELDS = ("label", "value", "std", "error", "report", "n", "runs", "paper", "paper_std")
SPEED_FIRST = (
    "samples_per_s",
    "batch",
    "latency_ms",
    "latency_p90_ms",
    "peak_memory_bytes",
    "text_ms",
    "network_ms",
    "decode_ms",
    "dtype",
)


def write_table(path: str | Path, records: Sequence[Result]) -> None:
    """Write the results in the format of the suffix: .md, .csv or .tex (atomically).

    UserError: another suffix, a path that cannot be written, or a file there that d2o did not write.
    """
    check_table_target(path)
    atomic_write(path, FORMATS[Path(path).suffix.lower()][0](records))


def check_table_target(path: str | Path) -> None:
    """UserError if `write_table` would refuse `path`."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        known = f"known formats: {', '.join(FORMATS)}, and .json for results"
        raise UserError(f"cannot write a table as {path.suffix or 'a file without a suffix'}: {path}", known)
    check_output(path, folder=False)
    mark = FORMATS[path.suffix.lower()][1].encode()
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            start = file.read(len(mark))
        if start != mark:
            raise UserError(f"{path} exists and is not a table of d2o: it is not overwritten", "choose another name")


def to_markdown(records: Sequence[Result]) -> str:
    """A GitHub table; its protocols are footnotes, referred to from the rows (from the header where all rows share
    one)."""
    table = results_table(records)
    shared = table.protocols == 1
    headers = [
        _md(h) + ("[^protocol]" if shared and kind == "n" else "")
        for h, kind in zip(table.headers, table.columns, strict=True)
    ]
    lines = [headers, ["---" if i == 0 else "---:" for i in range(len(headers))]]
    for i, row in enumerate(table.rows):
        cells = [_md(cell) for cell in row]
        for j, kind in enumerate(table.columns):
            if kind == "protocol":
                cells[j] = cells[j] if row[j] == NONE else f"[^{row[j]}]"
            elif (i, j) in table.best:
                cells[j] = f"**{cells[j]}**"
        lines.append(cells)
    notes = []
    for line in table.footer[: table.protocols]:
        letter, _, text = line.partition(": ")
        notes.append(f"[^{letter}]: {_md(text)}")
    listed = [f"- {_md(line)}" for line in table.footer[table.protocols :]]
    parts = [
        f"{MARKDOWN_MARK} {__version__} -->",
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        "\n".join(listed),
        "\n".join(notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_csv(records: Sequence[Result]) -> str:
    """One row for each record, every number in full. A metric has the columns KEY (its value), KEY.std, KEY.n, ...;
    fields that no record has are left out."""
    rows = [_flat(r) for r in records]
    keys = dict.fromkeys(key for r in records for key, _ in metrics(r))
    keys |= dict.fromkeys(key for r in records for key in paper_of(r))
    named = [key if field == "value" else f"{key}.{field}" for key in keys for field in METRIC_FIELDS]
    wanted = [*CSV_FIRST, *named, *(f"speed.{field}" for field in SPEED_FIRST)]
    present = dict.fromkeys(column for row in rows for column, value in row.items() if value is not None)
    columns = [
        *CSV_FIRST,
        *(c for c in wanted[len(CSV_FIRST) :] if c in present),
        *(c for c in present if c not in wanted),
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_csv(row.get(column)) for column in columns] for row in rows)
    return out.getvalue()


def _flat(record: Result) -> JsonObject:
    x, env = record["x"], record.get("env") or {}
    row: JsonObject = {"name": record["name"], **{field: x.get(field) for field in CSV_FIRST[1:]}}
    for key, metric in metrics(record):
        row[key] = metric["value"]
        row |= {f"{key}.{field}": metric.get(field) for field in METRIC_FIELDS if field != "value"}
    for key, (value, std) in paper_of(record).items():
        row |= {f"{key}.paper": value, f"{key}.paper_std": std}
    for group in ("speed", "distance"):
        row |= {f"{group}.{field}": value for field, value in (record["metrics"].get(group) or {}).items()}
    row["status"] = record.get("status")
    row["preset"] = (record.get("preset") or {}).get("name")
    row |= {f"protocol.{field}": value for field, value in (record.get("protocol") or {}).items()}
    row |= {f"env.{field}": env.get(field) for field in ("device", "gpu", "cpu", "threads", "torch")}
    return row | {"d2o": record.get("d2o"), "command": record.get("command"), "notes": record["notes"] or None}


def _csv(value: object) -> str:
    """Floats with all their digits; lists and records as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def to_tex(records: Sequence[Result]) -> str:
    """A booktabs tabular with its notes below, to be \\input into a table environment."""
    table = results_table(records)
    rows = [
        [rf"\textbf{{{_tex(cell)}}}" if (i, j) in table.best else _tex(cell) for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    body = [" & ".join(map(_tex, table.headers)) + r" \\", r"\midrule", *(" & ".join(row) + r" \\" for row in rows)]
    lines = [
        f"{TEX_MARK} {__version__}; needs \\usepackage{{booktabs}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.headers) - 1)}}}",
        r"\toprule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\smallskip{\footnotesize\raggedright",
        *(rf"{_tex(line)}\par" for line in table.footer),
        "}",
    ]
    return "\n".join(lines) + "\n"


MD_SPECIAL = re.compile(r"[\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is plain text
TEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",
    "]": "{]}",
    '"': r"\textquotedbl{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    ARROWS["lower"]: r"$\downarrow$",
    ARROWS["higher"]: r"$\uparrow$",
    "±": r"$\pm$",
    "†": r"\textdagger{}",
    "–": "--",
    "·": r"$\cdot$",
}


def _md(text: str) -> str:
    return MD_SPECIAL.sub(lambda found: "\\" + found[0], " ".join(text.replace("&", "&amp;").split()))


def _tex(text: str) -> str:
    return "".join(TEX_SPECIAL.get(character, character) for character in " ".join(text.split()))


FORMATS: dict[str, tuple[Callable[[Sequence[Result]], str], str]] = {
    ".md": (to_markdown, MARKDOWN_MARK),
    ".csv": (to_csv, ",".join(CSV_FIRST)),
    ".tex": (to_tex, TEX_MARK),
}
