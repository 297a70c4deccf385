import shutil
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file as foreign_save

from d2o.errors import UserError
from d2o.export.exporter import _same, export_checkpoint
from d2o.interop.safetensors_io import load_file, save_file
from d2o.networks.classifier import Classifier
from d2o.students.base import checkpoint_meta
from tests.export.conftest import save_conditional
from tests.helpers import SPEC


@pytest.fixture
def student(tmp_path):
    save_conditional(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_unknown_format_or_dtype_lists_the_known_and_the_nearest(student):
    with pytest.raises(UserError, match="unknown format 'onx': did you mean 'onnx'") as caught:
        export_checkpoint(student, "onx")
    assert caught.value.hint == "known: comfyui, diffusers, onnx, program, safetensors"
    with pytest.raises(UserError, match="unknown dtype 'fp61': did you mean 'fp16'"):
        export_checkpoint(student, "safetensors", dtype="fp61")


@pytest.mark.parametrize(
    ("file_format", "options", "message"),
    [
        ("safetensors", {"opset": 18}, "--opset is for --format onnx"),
        ("program", {"dtype": "fp16"}, "--dtype is for all formats but program"),
        ("onnx", {"dtype": "bf16"}, "--dtype bf16 is for weights"),
        ("onnx", {"merged": True}, "--merged is for --format diffusers"),
        ("comfyui", {"student_sigma": 2.5}, "comfyui has no such networks"),
        ("comfyui", {}, "is no student that takes prompts"),
        ("safetensors", {"check_n": 0}, "--check-n 0: expected at least 1"),
        ("safetensors", {"tolerance": 0.0}, "--tolerance 0.0: expected a positive"),
        ("safetensors", {"tolerance": float("nan")}, "--tolerance nan: expected a positive"),
        ("onnx", {"out": "x.pt2"}, r"x\.pt2: a file of format onnx ends in \.onnx"),
        ("program", {"out": "x.pt"}, r"x\.pt: a file of format program ends in \.pt2"),
    ],
)
def test_options_that_make_no_sense_are_refused(student, file_format, options, message):
    with pytest.raises(UserError, match=message):
        export_checkpoint(student, file_format, **options)
    assert names(student.parent) == ["s.safetensors"]


def test_missing_foreign_and_truncated_checkpoints(tmp_path, student):
    with pytest.raises(UserError, match="no such file"):
        export_checkpoint(tmp_path / "none.safetensors", "onnx")
    (tmp_path / "short.safetensors").write_bytes(student.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        export_checkpoint(tmp_path / "short.safetensors", "onnx")
    foreign_save({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not one of d2o's"):
        export_checkpoint(tmp_path / "foreign.safetensors", "onnx")
    network = Classifier(8, 1, 10, width=8)
    save_file(tmp_path / "e.safetensors", network.state_dict(), checkpoint_meta("extractor", network.config, None))
    with pytest.raises(UserError, match="holds a d2o extractor; only students and teachers"):
        export_checkpoint(tmp_path / "e.safetensors", "onnx")


@pytest.mark.parametrize(
    "damage, key",
    [
        ({"spec": None}, "spec"),
        ({"network": None}, "network"),
        ({"student": []}, "student"),
        ({"spec": {"shape": [1, 8, 8]}}, "spec.name"),
    ],
)
def test_a_checkpoint_with_parts_of_its_record_missing_is_told(student, damage, key):
    tensors, meta = load_file(student)
    save_file(student, tensors, {**meta, **damage})
    with pytest.raises(UserError, match=rf"s\.safetensors: its metadata: {key}: "):
        export_checkpoint(student, "safetensors")


def test_students_that_do_not_name_their_text_encoders_are_refused(student):
    tensors, meta = load_file(student)
    save_file(student, tensors, {**meta, "spec": {**SPEC.to_dict(), "condition": "text", "classes": 0}})
    with pytest.raises(UserError, match="does not say which text encoders"):
        export_checkpoint(student, "onnx")


def test_a_run_folder_gives_its_best_else_its_last_checkpoint(tmp_path, student):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="folder without a checkpoint"):
        export_checkpoint(run, "safetensors")
    shutil.copy(student, run / "checkpoints" / "last.safetensors")
    assert export_checkpoint(run, "safetensors").path == run / "last-fp32.safetensors"
    shutil.copy(student, run / "checkpoints" / "best.safetensors")
    done = export_checkpoint(run, "safetensors", dtype="bf16")
    assert done.path == run / "best-bf16.safetensors"
    assert "`best.safetensors`" in done.card.read_text()


def test_the_checkpoint_itself_is_never_overwritten(student):
    before = student.read_bytes()
    with pytest.raises(UserError, match="is the checkpoint itself"):
        export_checkpoint(student, "safetensors", student, force=True)
    assert student.read_bytes() == before


def test_another_file_of_that_name_is_kept_unless_forced(student, tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists and is another file") as caught:
        export_checkpoint(student, "safetensors", target)
    assert "--force" in caught.value.hint
    assert target.read_bytes() == b"mine"
    assert names(tmp_path) == ["s.safetensors", "x.safetensors"]
    assert not export_checkpoint(student, "safetensors", target, force=True).unchanged
    assert load_file(target)[1]["kind"] == "student"


def test_another_card_of_that_name_is_kept_unless_forced(student, tmp_path):
    note = tmp_path / "x.safetensors.md"
    note.write_text("mine")
    with pytest.raises(UserError, match=r"x\.safetensors\.md exists"):
        export_checkpoint(student, "safetensors", tmp_path / "x.safetensors")
    assert names(tmp_path) == ["s.safetensors", "x.safetensors.md"]
    export_checkpoint(student, "safetensors", tmp_path / "x.safetensors", force=True)
    assert "license: cc-by-nc-4.0" in note.read_text()


def test_the_same_export_again_is_fine_and_keeps_an_edited_card(student):
    first = export_checkpoint(student, "safetensors", dtype="fp16")
    data = first.path.read_bytes()
    first.card.write_text("edited")
    again = export_checkpoint(student, "safetensors", dtype="fp16")
    assert (first.unchanged, again.unchanged) == (False, True)
    assert again.path.read_bytes() == data
    assert again.card.read_text() == "edited"
    again.card.unlink()
    assert export_checkpoint(student, "safetensors", dtype="fp16").card.read_text().startswith("---\nlicense")


def test_a_file_above_the_tolerance_is_not_kept(student, tmp_path):
    with pytest.raises(UserError, match="above the tolerance 1e-06; the file is not kept"):
        export_checkpoint(student, "safetensors", dtype="bf16", tolerance=1e-6)
    assert names(tmp_path) == ["s.safetensors"]


def test_an_unwritable_place_is_one_line(student, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*: s\.safetensors is a file"):
        export_checkpoint(student, "safetensors", student / "x.safetensors")


def test_zips_that_differ_in_time_only_are_the_same(tmp_path):
    for name, year, text in (("a", 1990, "1"), ("b", 2020, "1"), ("c", 1990, "2")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(zipfile.ZipInfo("x", (year, *time.gmtime(0)[1:6])), text)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()
    assert _same(tmp_path / "a", tmp_path / "b")
    assert not _same(tmp_path / "a", tmp_path / "c")
    assert not _same(tmp_path / "a", tmp_path)


def test_a_builtin_teacher_is_written_where_the_user_is(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("d2o.export.loaded.asset", lambda name: folder / "teacher.safetensors")
    monkeypatch.chdir(tmp_path)
    done = export_checkpoint("digits", "safetensors", dtype="fp16")
    assert names(tmp_path) == ["teacher-fp16.safetensors", "teacher-fp16.safetensors.md"]
    assert (done.teacher, done.licence) == ("tiny", "CC0-1.0")
