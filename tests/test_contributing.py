"""CONTRIBUTING.md: the method that it adds in one file is added, trained, sampled and read back."""

import importlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import d2o.losses
import d2o.methods
from d2o.cli.app import main
from d2o.methods import base
from d2o.students.base import load_student

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`((?:d2o|recipes)/[\w/.]+)`[^\n]*:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
RECIPE = "recipes/ode_online_digits.yaml"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return int(end.value.code or 0)


@pytest.fixture
def added(tmp_path, monkeypatch) -> Path:
    """The page's files, in folders that the packages have beside their own: as if they were in the checkout."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    for package in (d2o.losses, d2o.methods):
        folder = tmp_path / package.__name__.replace(".", "/")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        for path in folder.glob("*.py"):  # not to be found by the tests after this one
            monkeypatch.setattr(package, path.stem, None, raising=False)
            monkeypatch.setitem(sys.modules, f"{package.__name__}.{path.stem}", None)
            del sys.modules[f"{package.__name__}.{path.stem}"]
    monkeypatch.setattr(base, "METHODS", base.find_methods())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_a_loss_a_method_and_a_recipe():
    assert [*FILES] == ["d2o/losses/robust.py", "d2o/methods/ode_online.py", RECIPE]


def test_a_method_is_there_when_its_file_is(added):
    (loss, method, _), known = FILES, base.METHODS
    assert known["ode-online"] == method.removesuffix(".py").replace("/", ".")
    assert known["dd-gan"] == "d2o.methods.dd_gan" and "student" not in known and "base" not in known
    x = torch.tensor([0.0, 0.2]).reshape(1, 1, 1, 2)
    found = importlib.import_module(loss.removesuffix(".py").replace("/", ".")).cauchy(x, torch.zeros_like(x), 0.1)
    assert found.tolist() == pytest.approx([math.log(3) / 2])


@pytest.mark.long
def test_it_trains_samples_and_is_read_back(added, capsys):
    assert run("recipes", "check", RECIPE) == 0
    assert run("train", RECIPE, "--mini", "--set", "threads=1", "--set", "log_every=1") == 0
    folder = added / "runs" / "ode_online_digits-mini"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 4
    assert run("sample", str(folder), "--n", "4", "--out", "online.zip") == 0
    student = load_student(folder / "checkpoints" / "last.safetensors")
    images = student(torch.randn(2, *student.spec.shape), torch.tensor([3, 7]))
    assert images.shape == (2, *student.spec.shape) and images.isfinite().all() and student.nfe == 1
    assert student.meta["recipe"]["ode_online"] == {"steps": 2, "scale": 0.1}
    capsys.readouterr()
    assert run("recipes", "explain", "ode_online.steps") == 0
    assert "Euler steps of the teacher" in capsys.readouterr().out
    assert run("train", RECIPE, "--set", "ode_online.stepps=3") == 2
