"""examples/: every file does what it says, on the smallest of models and images."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2o.cli.app import main
from d2o.students.base import Student, load_student
from d2o.teachers.in_edm import in_edm
from d2o.teachers.registry import load_teacher
from tests.helpers import tiny_student, tiny_teacher
from tests.teachers import pipelines
from tests.teachers.families import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = "--set images=8 --set batch=4 --set preview=null --set checkpoint.every=8 --set threads=1 --set log_every=1"


def run_script(name: str, *given: str) -> None:
    """The commands of a script in this process, with few samples and little training."""
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    values = iter(given)
    names = {}
    for line in lines:
        if found := re.match(r"([A-Z]+)=\$\{\d:-.*\}$", line):
            names[found[1]] = next(values)
        if not line.startswith("d2o "):
            continue
        for variable, value in names.items():
            line = line.replace(f"${variable}", value)
        line = re.sub(r"--n \d+", "--n 8", re.sub(r"pairs\.n=\d+", "pairs.n=8", line))
        line = re.sub(r"--steps \d+", "--steps 2", re.sub(r"pairs\.steps=\d+", "pairs.steps=2", line))
        line = re.sub(r"--set images=\d+", QUICK, line.replace("data.resolution=32", "data.resolution=8"))
        with pytest.raises(SystemExit) as end:
            main(shlex.split(line)[1:])
        assert not end.value.code, line


def test_a_student_in_five_lines(tmp_path, monkeypatch, capsys):
    tiny_student(tmp_path / "s.safetensors")
    monkeypatch.setattr(sys, "argv", ["load_student.py", str(tmp_path / "s.safetensors")])
    runpy.run_path(str(EXAMPLES / "load_student.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("(8, 1, 8, 8) from 1 network call(s)")


@pytest.mark.long
def test_a_teacher_in_diffusers_format_from_pairs_to_export(tmp_path, monkeypatch):
    from d2o.export.folder import open_pipeline

    monkeypatch.chdir(tmp_path)
    pipelines.unconditional("DDIMPipeline").save_pretrained(tmp_path / "my-model")
    run_script("own_teacher.sh", "my-model")
    pipeline = open_pipeline(tmp_path / "runs/own/one-call")
    assert np.asarray(pipeline(batch_size=2, num_inference_steps=1, output_type="np").images).shape == (2, 8, 8, 3)
    assert (tmp_path / "runs/own/samples.png").exists()


@pytest.mark.long
def test_own_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    run_script("own_images.sh", "images")
    student = load_student(tmp_path / "runs/mine/student")
    assert student.spec.shape == (1, 8, 8) and student.spec.classes == 2 and student.nfe == 1
    assert "FD" in capsys.readouterr().out


def test_images_of_another_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (1000, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "theirs.npz", images)
    run_script("other_images.sh", "theirs.npz", "real:digits")
    assert "FD" in (tmp_path / "theirs.md").read_text()


def test_the_page_makes_both_images_from_one_seed(tmp_path):
    both = runpy.run_path(str(EXAMPLES / "page.py"))["both"]
    teacher, student = tiny_teacher(), tiny_student()
    slow, slow_text, fast, fast_text = both(teacher, student, "3", 7, 1.0)
    assert slow.size == fast.size == (384, 384) and "18 steps" in slow_text and "1 network call," in fast_text
    again = both(teacher, student, "3", 7, 1.0)
    assert again[2].tobytes() == fast.tobytes() != both(teacher, student, "4", 7, 1.0)[2].tobytes()
    with pytest.raises(ValueError, match="classes are 0 to 9"):
        both(teacher, student, "10", 7, 1.0)


def test_the_page_takes_prompts(tmp_path):
    both = runpy.run_path(str(EXAMPLES / "page.py"))["both"]
    teacher = tiny("sd", tmp_path)
    teacher.spec = type(teacher.spec).from_dict({**teacher.spec.to_dict(), "steps": 2})
    base = in_edm(teacher)
    slow, _, fast, _ = both(teacher, Student(base.network, base.spec, 14.6).eval(), "abc", 0, 2.0)
    assert slow.size == fast.size == (384, 384)


def test_the_page_stands(tmp_path):
    import gradio

    page = runpy.run_path(str(EXAMPLES / "page.py"))["page"]
    assert isinstance(page(load_teacher("digits"), tiny_student(), 1.0), gradio.Blocks)


def test_every_file_is_listed():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert {name for name in files if f"[{name}]({name})" not in text} == set()
