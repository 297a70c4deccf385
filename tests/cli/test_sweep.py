"""`d2o train --sweep`: a set of runs that is checked first, continues where it was stopped, and ends with one table and
one picture."""

from __future__ import annotations

import json
import os
import signal
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2o.cli.app import main
from d2o.interop.safetensors_io import read_meta
from d2o.methods import ode
from d2o.training.loop import Trainer
from tests.helpers import tiny_recipe, tiny_student

RECIPE = """
name: test
title: A <small> test
method: ode
teacher: {teacher}
pairs: {{path: {pairs}, n: 32, solver: euler, steps: 2, batch: 32, shard_size: 32}}
ode: {{loss: mse}}
optim: {{lr: 1.0e-3}}
batch: 16
images: 96
log_every: 2
threads: 1
eval: {{every: 32, extractor: digits, n: 20, reference: real:digits}}
mini: {{images: 32}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path, RECIPE)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The iteration of every step that was trained."""
    seen: list[int] = []
    original = ode.ODE.step

    def step(self, loop, batch, iteration):
        if isinstance(loop, Trainer):  # and not the plan
            seen.append(iteration)
        return original(self, loop, batch, iteration)

    monkeypatch.setattr(ode.ODE, "step", step)
    return seen


def d2o(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


def test_further_metrics_have_pictures_of_their_own(recipe, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert d2o("train", recipe, "--sweep", "optim.lr=1e-3,1e-4", "--set", "eval.also=[is@digits]", "--out", out) == 0
    assert "sweep.is@digits.svg and sweep.svg" in capsys.readouterr().err.replace(f"{out}/", "")
    texts = [node.text for node in xml.parse(out / "sweep.is@digits.svg").iter() if node.tag.endswith("text")]
    assert {"optim.lr=0.001", "is@digits; beside each run its highest value"} <= set(texts)


@pytest.mark.long
def test_a_stopped_sweep_continues_and_ends_with_a_table_a_picture_and_the_best(
    recipe, tmp_path, capsys, steps, monkeypatch
):
    out = tmp_path / "sweep"
    command = ["train", recipe, "--sweep", "optim.lr=1e-2,1e-3,1e-4", "--out", out]
    counting = ode.ODE.step
    monkeypatch.setattr(
        ode.ODE, "step", lambda *a: (os.kill(os.getpid(), signal.SIGTERM) if len(steps) == 8 else None, counting(*a))[1]
    )
    assert d2o(*command) == 128 + signal.SIGTERM
    err = capsys.readouterr().err
    assert "optim.lr=0.001 (2 of 3): stopped after 48 images, saved; the same command continues" in err
    record = json.loads((out / "sweep.json").read_text())
    assert [(m["name"], m["state"], m["seen"]) for m in record["members"]] == [
        ("optim.lr=0.0001", "waiting", 0),
        ("optim.lr=0.001", "begun", 48),
        ("optim.lr=0.01", "finished", 96),
    ]
    monkeypatch.setattr(ode.ODE, "step", counting)
    assert d2o(*command) == 0
    captured = capsys.readouterr()
    assert "optim.lr=0.01 (1 of 3) is finished" in captured.err and "resumed after 48 images" in captured.err
    assert steps == [*range(6), *range(6), *range(6)]  # each iteration of each run once
    record = json.loads((out / "sweep.json").read_text())
    assert record["metric"] == "fd" and [m["settings"] for m in record["members"]] == [
        {"optim.lr": v} for v in (1e-4, 1e-3, 1e-2)
    ]
    assert all(m["state"] == "finished" and [x for x, _ in m["curve"]] == [32, 64, 96] for m in record["members"])
    lowest = min((y, m["name"]) for m in record["members"] for _, y in m["curve"])
    assert (record["best"]["value"], record["best"]["member"]) == lowest
    assert all(
        m["best"]["value"] == read_meta(out / m["folder"] / "checkpoints" / "best.safetensors")["metrics"]["fd"]
        for m in record["members"]
    )
    assert (
        all(m["name"] in captured.out for m in record["members"])
        and f"{lowest[1]} *" in captured.out
        and "lower is better" in captured.out
    )
    picture = xml.parse(out / "sweep.svg")
    texts = [node.text for node in picture.iter() if node.tag.endswith("text")]
    assert texts[0] == "A <small> test" and {"optim.lr=0.001", "optim.lr=0.01", "images seen"} <= set(texts)
    assert len([node for node in picture.iter() if node.tag.endswith("polyline")]) == 3
    # a member is the run that would have been trained alone
    assert d2o("train", recipe, "--set", "optim.lr=1e-3", "--out", tmp_path / "alone") == 0
    files = [folder / "checkpoints" / "state.safetensors" for folder in (tmp_path / "alone", out / "optim.lr=0.001")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # more values join what is there; finished runs are not repeated
    steps.clear()
    assert d2o("train", recipe, "--sweep", "optim.lr=1.0e-3,2e-3", "--out", out) == 0
    assert steps == [*range(6)]
    assert [m["name"] for m in json.loads((out / "sweep.json").read_text())["members"]] == [
        "optim.lr=0.0001",
        "optim.lr=0.001",
        "optim.lr=0.002",
        "optim.lr=0.01",
    ]
    for more, words in ((["--set", "batch=8"], "batch: 16 -> 8"), (["--sweep", "loss=l1"], "is a sweep over optim.lr")):
        assert d2o("train", recipe, "--sweep", "optim.lr=1e-3,2e-3", "--out", out, *more) == 2
        assert words in capsys.readouterr().err
    # and may grow longer, as a run may
    steps.clear()
    assert d2o("train", recipe, "--sweep", "optim.lr=1e-3", "--out", out, "--set", "images=128") == 0
    assert (
        steps == [6, 7]
        and {m["name"]: m["seen"] for m in json.loads((out / "sweep.json").read_text())["members"]}["optim.lr=0.001"]
        == 128
    )


def test_variants_side_by_side_with_their_last_previews(recipe, tmp_path):
    text = recipe.read_text() + "variants:\n  flat: {ode: {loss: l1}}\n  square: {ode: {loss: mse}}\n"
    recipe.write_text(text + "preview: {every: 32, n: 4}\n")
    out = tmp_path / "sweep"
    assert d2o("train", recipe, "--sweep", "variant=square,flat", "--mini", "--out", out) == 0
    record = json.loads((out / "sweep.json").read_text())
    assert [m["name"] for m in record["members"]] == ["variant=square", "variant=flat"]  # in their order
    assert record["members"][0]["settings"] == {"variant": "square"} and record["keys"] == ["variant"]
    assert read_meta(out / "variant=flat" / "checkpoints" / "last.safetensors")["recipe"]["ode"]["loss"] == "l1"
    one = Image.open(sorted((out / "variant=flat" / "previews").iterdir())[-1])
    both = Image.open(out / "sweep.png")
    assert both.width == one.width and both.height > 2 * one.height
    assert (np.array(both)[-10 - one.height : -10] == np.array(one.convert("RGB"))).all()
    assert d2o("train", recipe, "--sweep", "variant=flat", "--mini", "--out", out) == 0  # another first one


@pytest.mark.long
def test_a_member_killed_at_its_first_file_does_not_stop_the_sweep(recipe, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert d2o("train", recipe, "--sweep", "optim.lr=1e-2", "--out", out) == 0
    (out / "optim.lr=0.001").mkdir()
    (out / "optim.lr=0.001" / ".recipe.yaml.abc.tmp").touch()  # killed while it wrote this
    assert d2o("train", recipe, "--sweep", "optim.lr=1e-2,1e-3", "--out", out) == 0
    assert not [path for path in out.rglob(".*") if path.suffix == ".tmp"]


def test_nothing_is_made_where_a_value_is_wrong_or_a_plan_is_asked_for(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert (
        d2o("train", recipe, "--sweep", "loss=l1,l2") == 2
        and "--sweep ode.loss: expected 'mse', 'l1'" in capsys.readouterr().err
    )
    assert d2o("train", recipe, "--sweep", "loss=l1,perceptual") == 2
    assert (
        "--sweep: loss=perceptual: ode.extractor: the perceptual loss needs a feature extractor"
        in capsys.readouterr().err
    )
    assert d2o("train", recipe, "--sweep", "batch=8,16", "--sweep", "loss=l1,mse", "--mini", "--plan") == 0
    out = capsys.readouterr().out
    assert (
        all(f"batch={b},loss={loss}" in out for b in (8, 16) for loss in ("l1", "mse"))
        and "4 runs" in out
        and "together" in out
    )
    assert sorted(tmp_path.iterdir()) == before


def test_a_member_that_fails_does_not_keep_the_others_from_their_turn(recipe, tmp_path, capsys, monkeypatch):
    original = ode.ODE.step

    def step(self, loop, batch, iteration):
        batch.target = batch.target * (float("nan") if self.options.loss == "mse" else 1)
        return original(self, loop, batch, iteration)

    monkeypatch.setattr(ode.ODE, "step", step)
    monkeypatch.chdir(tmp_path)
    assert d2o("train", recipe, "--mini", "--sweep", "loss=mse,l1") == 2
    captured = capsys.readouterr()
    assert "1 of 2 runs failed: loss=mse" in captured.err and "not finite" in captured.err
    record = json.loads((tmp_path / "runs" / "test-sweep-loss-mini" / "sweep.json").read_text())
    assert [(m["state"], bool(m["error"])) for m in record["members"]] == [("failed", True), ("finished", False)]
    assert record["best"]["member"] == "loss=l1"


@pytest.mark.long
def test_finetune_sweeps_too_and_a_run_is_no_sweep(recipe, tmp_path, capsys):
    tiny_student(tmp_path / "s.safetensors")
    arguments = ["--set", "eval=null", "--set", "images=32", "--out", tmp_path / "out"]
    assert d2o("finetune", recipe, "--from", tmp_path / "s.safetensors", "--sweep", "loss=l1,mse", *arguments) == 0
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["metric"] == "loss" and record["best"] is None and all(m["curve"] for m in record["members"])
    assert read_meta(tmp_path / "out" / "loss=l1" / "checkpoints" / "last.safetensors")["provenance"][-2][
        "started_from"
    ]
    assert (
        d2o("train", recipe, "--sweep", "loss=l1,mse", *arguments) == 2
        and "was started from" in capsys.readouterr().err
    )
    assert d2o("train", recipe, "--sweep", "loss=l1,mse", "--out", tmp_path / "out" / "loss=l1") == 2
    assert "holds a run, not a sweep" in capsys.readouterr().err
    assert d2o("train", recipe, "--sweep", "loss=l1,mse", "--out", tmp_path / "pairs") == 2
    assert "holds other files" in capsys.readouterr().err
