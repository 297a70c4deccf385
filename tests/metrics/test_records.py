"""Results as files and as a table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from d2o.errors import UserError
from d2o.metrics.records import check_json_target, load_records, save_records
from d2o.metrics.table import number, results_table
from tests.metrics.samples import record


def test_one_record_is_an_object_and_several_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_records(path, [record()])
    assert isinstance(json.loads(path.read_text()), dict) and load_records(path) == [record()]
    save_records(path, [record(), record(name="two")])  # own files may be replaced
    assert isinstance(json.loads(path.read_text()), list) and [r["name"] for r in load_records(path)] == ["student", "two"]


def test_run_folder_holds_eval_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no eval\.json") as caught:
        load_records(tmp_path)
    assert "d2o eval" in caught.value.hint
    save_records(tmp_path / "eval.json", [record()])
    assert load_records(tmp_path) == [record()]


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"format": "other"}', '[{"format": "d2o-eval", "version": 1}, 3]'])
def test_foreign_files_are_neither_read_nor_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a result"):
        load_records(path)
    with pytest.raises(UserError, match="not overwritten"):
        save_records(path, [record()])
    assert path.read_text() == content


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file"):
        check_json_target(tmp_path / "file" / "x.json")
    with pytest.raises(UserError, match="a folder of that name"):
        check_json_target(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_records(tmp_path / "absent.json")
    newer = record() | {"version": 99}
    (tmp_path / "new.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match="newer d2o"):
        load_records(tmp_path / "new.json")


def with_protocol(r: dict[str, Any], **changes: Any) -> dict[str, Any]:
    r = copy.deepcopy(r)
    r["protocol"] |= changes
    return r


def test_one_protocol_is_stated_below() -> None:
    table = results_table([record(), record(name="teacher", kind="teacher", nfe=35, fd=0.5)])
    assert table.headers == ["name", "n", "FD(digits)", "accuracy", "NFE", "samples/s"]
    assert table.rows[0] == ["student", "4,000", "1.42", "97.5 %", "1", "1,640"]
    assert table.footer[0].startswith("protocol: n = 4,000 · seeds 1000000..1003999 · labels random · features digits/64, weights 8ac411")
    assert any("samples/s" in line and "Some CPU" in line for line in table.footer)


def test_rows_of_other_protocols_have_letters_and_a_warning() -> None:
    table = results_table([record(), with_protocol(record(), n_gen=899, seeds=None, n_ref=898)])
    assert table.headers[-1] == "protocol" and [row[-1] for row in table.rows] == ["a", "b"]
    assert table.footer[0].startswith("a: n = 4,000") and table.footer[1].startswith("b: n = 899")
    assert any("rows of equal n only" in line for line in table.footer)


def test_marks_repeats_small_n_and_other_extractors() -> None:
    small, other = record(), record()
    small["metrics"]["fd"] |= {"small_n": True, "std": 0.0312, "runs": [1.4, 1.5]}
    other["metrics"]["fd"]["label"] = "FD(own@abc123)"
    table = results_table([small, other])
    assert table.rows[0][2] == "FD(digits) 1.42 ± 0.0312†" and table.rows[1][2] == "FD(own@abc123) 1.42" and table.headers[2] == "FD"
    assert any(line.startswith("†") for line in table.footer) and any(line.startswith("±") for line in table.footer)
    assert not any("FID" in cell for row in [*table.rows, table.headers, table.footer] for cell in row)


def test_notes_and_forwards_are_shown() -> None:
    r = record(nfe=35)
    r["x"]["forwards"] = 70
    r["notes"] = ["be careful"]
    table = results_table([r])
    assert table.rows[0][4] == "35 (70 forwards)" and "note: be careful" in table.footer


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.01234, "0.0123"), (0.7, "0.700"), (12.0, "12.0"), (99.96, "100"), (321.4, "321"), (1640.2, "1,640")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
