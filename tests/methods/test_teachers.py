"""Which teachers a method takes is known from a name, a folder or a file alone, and said before anything is fetched or
made."""

from __future__ import annotations

import json
import shutil

import pytest

from d2o.cli.app import main
from d2o.errors import UserError
from d2o.interop.assets import asset
from d2o.interop.catalogue import names
from d2o.methods.base import get_method, method_names
from d2o.methods.teachers import check_kind, check_teacher, takes, why_not
from d2o.teachers.base import Teacher
from d2o.teachers.kinds import expected_kind, kind_of
from d2o.teachers.registry import load_teacher
from tests.helpers import tiny_network, tiny_teacher

DISTILLING = [name for name in method_names() if get_method(name).takes]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


def test_methods_that_distil():
    assert DISTILLING == ["cd", "ctm", "diffusion2gan", "dmd", "gdd", "ode", "pd", "sid"]


@pytest.fixture
def ddpm(tmp_path):
    """A folder in diffusers' layout: what it is shows without its weights."""
    (tmp_path / "ddpm").mkdir()
    (tmp_path / "ddpm" / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    return tmp_path / "ddpm"


@pytest.mark.parametrize(
    ("teacher", "family"),
    [
        ("sd15", "sd"),
        ("sdxl", "sd"),
        ("sd3-medium", "flow"),
        ("tiny-sd", "sd"),
        ("someone/ddpm-faces", "diffusers"),
        ("folder", "ddpm"),
    ],
)
def test_a_name_a_folder_or_a_repository_says_the_family(teacher, family, ddpm):
    kind = expected_kind(str(ddpm) if teacher == "folder" else teacher)
    assert kind is not None and kind.family == family and kind.text == (family in ("sd", "flow"))


def test_a_refusal_says_why_and_what_can_be_done(ddpm):
    with pytest.raises(UserError) as caught:
        check_kind("cd", expected_kind("edm2-img512-xs"))
    assert "is an EDM2 network, which method cd cannot learn from: " in caught.value.message
    assert (
        "methods that take this teacher: diffusion2gan, dmd, gdd, ode, sid\n" in caught.value.hint
        and "EDM" in caught.value.hint
    )
    assert not any(why_not("cd", kind) for kind in [expected_kind("digits"), expected_kind("owner/name")])


def test_what_each_method_takes_of_the_published_teachers():
    taken = {method: {name for name in names() if takes(method, expected_kind(name))} for method in DISTILLING}
    edm, edm2 = ({name for name in names() if name.startswith(start)} for start in ("edm-", "edm2-"))
    text = {"sd15", "sdxl", "sd3-medium"}
    assert taken == {
        **dict.fromkeys(("cd", "ctm", "pd"), edm | text),
        **dict.fromkeys(("diffusion2gan", "dmd", "gdd", "ode", "sid"), edm | edm2 | text),
    }


def test_files_say_what_they_hold_and_loaded_teachers_are_of_the_same_kind(tmp_path):
    teacher, found = tiny_teacher(tmp_path / "t.safetensors"), expected_kind(str(tmp_path / "t.safetensors"))
    assert (
        (found.family, found.arch, found.precond)
        == ("edm", "ddpmpp", "edm")
        == (kind_of(teacher).family, kind_of(teacher).arch, "edm")
    )
    assert kind_of(load_teacher("digits")) == expected_kind("digits")
    assert expected_kind(str(tmp_path / "nowhere.safetensors")) is None and expected_kind("digitz") is None
    (tmp_path / "x.pkl").write_bytes(b"")
    assert expected_kind(str(tmp_path / "x.pkl")).precond is None and takes(
        "ctm", expected_kind(str(tmp_path / "x.pkl"))
    )


def test_another_preconditioning_is_not_consistencys():
    network, spec = tiny_network(), load_teacher("digits").spec
    network.precond = "vp"
    teacher = Teacher(network, spec)
    assert takes("ode", kind_of(teacher)) and not takes("ctm", kind_of(teacher))
    with pytest.raises(UserError, match="is in preconditioning vp") as caught:
        check_teacher("pd", teacher)
    assert "methods that take this teacher: diffusion2gan, dmd, gdd, ode, sid" in caught.value.hint


@pytest.mark.parametrize("words", [["train", "cd_digits"], ["finetune", "cd_digits", "--from", "nowhere.safetensors"]])
def test_commands_refuse_before_pairs_are_made_or_anything_is_fetched(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    assert run(*words, "--set", "teacher=edm2-img512-xs") == 2
    assert "is an EDM2 network, which method" in capsys.readouterr().err
    assert run(*words, "--set", "teacher=edm2-img512-xs", "--plan") == 1
    assert "is an EDM2 network, which method" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_methods_without_a_teacher_refuse_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", "teacher_digits", "--set", "teacher=digits") == 2
    assert "method edm learns without a teacher" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_run_folder_of_a_text_to_image_teacher(tmp_path):
    from d2o.interop.safetensors_io import save_file
    from d2o.students.base import checkpoint_meta

    save_file(tmp_path / "t.safetensors", {}, checkpoint_meta("teacher", {"arch": "text_to_image"}, None))
    kind = expected_kind(str(tmp_path / "t.safetensors"))
    assert kind.family == "sd" and kind.text
    shutil.copytree(asset("tiny-sd"), tmp_path / "sd")
    assert expected_kind(str(tmp_path / "sd")).family == "sd"
