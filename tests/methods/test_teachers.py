"""Which teachers a method takes is known from a name, a folder or a file alone, and said before anything is fetched or
made."""

from __future__ import annotations

import json
import shutil

import pytest

from d2o.cli.app import main
from d2o.errors import UserError
from d2o.interop.assets import asset
from d2o.methods.base import get_method, method_names
from d2o.methods.teachers import check_kind, check_teacher, takes
from d2o.teachers.base import Teacher
from d2o.teachers.catalogue import names
from d2o.teachers.kinds import kind_of, look
from d2o.teachers.registry import load_teacher
from tests.helpers import tiny_network, tiny_teacher

DISTILLING = [name for name in method_names() if get_method(name).takes]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


def test_methods_that_distil():
    assert DISTILLING == ["cd", "ctm", "dmd", "ode", "pd", "sid"]


@pytest.fixture
def ddpm(tmp_path):
    """A folder in diffusers' layout: what it is shows without its weights."""
    (tmp_path / "ddpm").mkdir()
    (tmp_path / "ddpm" / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    return tmp_path / "ddpm"


@pytest.mark.parametrize("method", DISTILLING)
@pytest.mark.parametrize("teacher", ["sd15", "sd3-medium", "tiny-sd", "someone/ddpm-faces", "folder"])
def test_teachers_in_diffusers_format_are_refused_by_name_folder_and_repository(method, teacher, ddpm):
    name = str(ddpm) if teacher == "folder" else teacher
    kind = look(name)
    assert kind is not None and kind.family == "diffusers"
    with pytest.raises(UserError) as caught:
        check_kind(method, kind)
    assert "is in diffusers' format" in caught.value.message and f"d2o pairs --teacher {name}" in caught.value.hint
    assert "digits, edm-..." in caught.value.hint


def test_what_each_method_takes_of_the_published_teachers():
    taken = {method: {name for name in names() if takes(method, look(name))} for method in DISTILLING}
    edm, edm2 = ({name for name in names() if name.startswith(start)} for start in ("edm-", "edm2-"))
    assert taken == {
        **dict.fromkeys(("cd", "ctm", "pd"), edm),
        **dict.fromkeys(("dmd", "ode", "sid"), edm | edm2),
    }


def test_files_say_what_they_hold_and_loaded_teachers_are_of_the_same_kind(tmp_path):
    teacher, found = tiny_teacher(tmp_path / "t.safetensors"), look(str(tmp_path / "t.safetensors"))
    assert (
        (found.family, found.arch, found.precond)
        == ("edm", "ddpmpp", "edm")
        == (kind_of(teacher).family, kind_of(teacher).arch, "edm")
    )
    assert kind_of(load_teacher("digits")) == look("digits")
    assert look(str(tmp_path / "nowhere.safetensors")) is None and look("digitz") is None
    (tmp_path / "x.pkl").write_bytes(b"")
    assert look(str(tmp_path / "x.pkl")).precond is None and takes("ctm", look(str(tmp_path / "x.pkl")))


def test_another_preconditioning_is_not_consistencys():
    network, spec = tiny_network(), load_teacher("digits").spec
    network.precond = "vp"
    teacher = Teacher(network, spec)
    assert takes("ode", kind_of(teacher)) and not takes("ctm", kind_of(teacher))
    with pytest.raises(UserError, match="is in preconditioning vp") as caught:
        check_teacher("pd", teacher)
    assert "methods that take this teacher: dmd, ode, sid" in caught.value.hint


@pytest.mark.parametrize(
    "words", [["train", "quickstart"], ["finetune", "quickstart", "--from", "nowhere.safetensors"]]
)
def test_commands_refuse_before_pairs_are_made_or_anything_is_fetched(words, tmp_path, ddpm, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    for teacher in ("sdxl", "owner/name", ddpm):
        assert run(*words, "--set", f"teacher={teacher}") == 2
        assert "is in diffusers' format" in capsys.readouterr().err
        assert run(*words, "--set", f"teacher={teacher}", "--plan") == 1
        assert "is in diffusers' format" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ddpm"]


def test_methods_without_a_teacher_refuse_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", "teacher_digits", "--set", "teacher=digits") == 2
    assert "method edm learns without a teacher" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_folder_of_a_text_to_image_teacher(tmp_path):
    from d2o.interop.safetensors_io import save_file
    from d2o.students.base import checkpoint_meta

    save_file(tmp_path / "t.safetensors", {}, checkpoint_meta("teacher", {"arch": "text_to_image"}, None))
    kind = look(str(tmp_path / "t.safetensors"))
    assert kind.family == "text" and not any(takes(method, kind) for method in DISTILLING)
    shutil.copytree(asset("tiny-sd"), tmp_path / "sd")
    assert look(str(tmp_path / "sd")).family == "diffusers"
