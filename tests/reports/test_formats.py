"""The table as a file: GitHub markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from d2o.errors import UserError
from d2o.reports.cells import quoted
from d2o.reports.formats import check_table_target, to_csv, to_markdown, to_tex, write_table
from tests.samples import record

EVIL = r"a|b_c *x* [y](z) <i> & 50% $1 {#} \n~^"


def other_protocol(name: str) -> dict[str, Any]:
    r = record(name, kind="images", nfe=None)  # type: ignore[arg-type]
    r["protocol"] |= {"n_gen": 899, "n_ref": 898}
    return r


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_has_one_row_a_result_and_footnotes_that_are_referred_to() -> None:
    lines = to_markdown(
        [record("a", fd=1.0), record("b", fd=2.0), other_protocol("halves"), quoted("old", {"fd": 9.0}, "a paper")]
    ).splitlines()
    table = [cells(line) for line in lines if line.startswith("|")]
    assert len(table) == 6 and len({len(row) for row in table}) == 1
    assert table[0][:3] == ["name", "n", "FD(digits) ↓"] and table[1] == ["---", *["---:"] * (len(table[0]) - 1)]
    assert table[2][2] == "**1.00**" and table[3][2] == "2.00" and table[5][:4] == ["old", "–", "–", "9"]
    defined = {line[: line.index(":")] for line in lines if line.startswith("[^")}
    assert {row[-1] for row in table[2:5]} == defined == {"[^a]", "[^b]"} and table[5][-1] == "–"
    assert any(line.startswith("- not comparable, different n") for line in lines)


def test_a_shared_protocol_is_a_footnote_of_the_header() -> None:
    text = to_markdown([record("a")])
    assert "| name | n[^protocol] |" in text and "\n[^protocol]: n = 4,000 · seeds" in text


def test_names_cannot_break_the_formats() -> None:
    rows = [record(EVIL, notes=[EVIL + "\nnext line"]), record("b")]
    table = [cells(line) for line in to_markdown(rows).splitlines() if line.startswith("|")]
    assert len({len(row) for row in table}) == 1
    assert table[2][0] == r"a\|b_c \*x\* \[y\](z) \<i\> &amp; 50% \$1 {#} \\n\~^"
    tex = to_tex(rows)
    assert (
        r"a\textbar{}b\_c *x* {[}y{]}(z) \textless{}i\textgreater{} \& 50\% \$1 \{\#\}"
        r" \textbackslash{}n\textasciitilde{}" in tex
    )
    assert len(list(csv.reader(io.StringIO(to_csv(rows))))) == 3


def test_csv_keeps_every_digit_and_field() -> None:
    a, b = record("a", fd=1.4212345678901234), record("b, too")
    a["metrics"]["fd"] |= {"std": 0.012345678901234567, "runs": [1.4, 1.5], "error": "runs"}
    a["metrics"]["kid@lite0"] = {
        "label": "KID(lite0)",
        "value": 1.5e-7,
        "runs": [1.5e-7],
        "std": None,
        "better": "lower",
        "n": 1000,
    }
    a["metrics"]["speed"] |= {"latency_ms": 1.25}
    a |= {"paper": {"fd": [1.4, 0.01], "recall": 0.5}, "preset": {"name": "p"}, "notes": ["x"]}
    rows = list(csv.DictReader(io.StringIO(to_csv([a, b]))))
    first, second = rows
    assert float(first["fd"]) == 1.4212345678901234 and float(first["fd.std"]) == 0.012345678901234567
    assert json.loads(first["fd.runs"]) == [1.4, 1.5] and first["fd.label"] == "FD(digits)"
    assert float(first["kid@lite0"]) == 1.5e-7 and first["kid@lite0.n"] == "1000" and second["kid@lite0"] == ""
    assert (first["fd.paper"], first["fd.paper_std"], first["recall.paper"]) == ("1.4", "0.01", "0.5") and first[
        "preset"
    ] == "p"
    assert second["name"] == "b, too" and second["sha256"] == "c" * 64 and second["nfe"] == second["forwards"] == "1"
    assert first["protocol.n_gen"] == "4000" and json.loads(first["protocol.seeds"]) == [1_000_000, 1_003_999]
    assert first["speed.latency_ms"] == "1.25" and first["env.torch"] == "2.6.0" and json.loads(first["notes"]) == ["x"]
    assert "env.gpu" not in first and "kid@lite0.std" not in first  # nobody has them


def test_tex_is_a_booktabs_tabular() -> None:
    lines = to_tex([record("a", fd=1.0), record("b", fd=2.0)]).splitlines()
    assert lines[1] == r"\begin{tabular}{lrrrrrr}" and lines[2] == r"\toprule" and r"\bottomrule" in lines
    assert lines[3] == r"name & n & FD(digits) $\downarrow$ & accuracy $\uparrow$ & NFE & params & samples/s \\"
    assert lines[5].startswith(r"a & 4,000 & \textbf{1.00} & \textbf{97.5 \%} & 1 &")
    text = "\n".join(lines)
    assert text.count("{") == text.count("}") and r"edm\_round" in text


@pytest.mark.parametrize("suffix", [".md", ".csv", ".tex", ".CSV"])
def test_own_files_are_replaced_and_foreign_ones_kept(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    write_table(path, [record("a")])
    write_table(path, [record("again")])
    assert "again" in path.read_text() and not list(tmp_path.glob(".*"))
    for mine in ("name,kind,mark\nx,y,z\n", "# my notes\n", "\\documentclass{article}"):
        path.write_text(mine)
        with pytest.raises(UserError, match="not a table of d2o: it is not overwritten"):
            write_table(path, [record("a")])
        assert path.read_text() == mine
    path.write_text("")
    write_table(path, [record("a")])
    assert path.read_text()


def test_other_formats_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write a table as \.xlsx") as caught:
        check_table_target(tmp_path / "t.xlsx")
    assert ".md, .csv, .tex" in caught.value.hint
    with pytest.raises(UserError, match="a file without a suffix"):
        check_table_target(tmp_path / "t")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file"):
        check_table_target(tmp_path / "file" / "t.md")
