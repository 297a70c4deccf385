"""Results as files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.evaluation.results import check_json_target, load_records, save_records
from d2o.interop.temporary import temporary_file
from tests.samples import record


def test_one_record_is_an_object_and_several_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_records(path, [record()])
    assert isinstance(json.loads(path.read_text()), dict) and load_records(path) == [record()]
    save_records(path, [record(), record(name="two")])  # own files may be replaced
    assert isinstance(json.loads(path.read_text()), list) and [r["name"] for r in load_records(path)] == [
        "student",
        "two",
    ]


def test_run_folder_holds_eval_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no eval\.json") as caught:
        load_records(tmp_path)
    assert "d2o eval" in caught.value.hint
    save_records(tmp_path / "eval.json", [record()])
    assert load_records(tmp_path) == [record()]


@pytest.mark.parametrize(
    "content", ["{}", "[]", "not json", '{"format": "other"}', '[{"format": "d2o-eval", "version": 1}, 3]']
)
def test_foreign_files_are_neither_read_nor_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a result"):
        load_records(path)
    with pytest.raises(UserError, match="not overwritten"):
        save_records(path, [record()])
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["protocol"], None),
        (["protocol", "n_gen"], "many"),
        (["metrics", "fd", "value"], "low"),
        (["metrics", "fd", "value"], float("nan")),
        (["x"], []),
        (["x", "kind"], None),
        (["grid", "n"], 10**30),
        (["grid"], None),
        (["notes"], [1]),
        (["env", "threads"], {}),
        (["name"], 3),
    ],
)
def test_edited_results_are_refused_with_the_key(tmp_path: Path, keys: list[str], value: object) -> None:
    edited = record()
    place = edited
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "x.json").write_text(json.dumps(edited))
    with pytest.raises(UserError, match=keys[-1]):
        load_records(tmp_path / "x.json")


def test_deep_json_and_pipes_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="not a result"):
        load_records(tmp_path / "deep.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a named pipe"):
        load_records(tmp_path / "pipe")


def test_what_killed_writers_left_is_swept_and_living_ones_are_not(tmp_path: Path) -> None:
    for name in (".e.json.12345678.tmp", ".other.json.12345678.tmp"):
        (tmp_path / name).write_text("half")
    with temporary_file(tmp_path / "e.json") as living:
        check_json_target(tmp_path / "e.json")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([living.name, ".other.json.12345678.tmp"])


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
