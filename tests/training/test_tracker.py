"""The log at a tracker, with stand-ins for the packages: they keep what they are given, and know runs by their id as
the real ones do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from d2o.errors import UserError
from d2o.recipes.load import load_recipe
from d2o.training.tracker import tracked
from tests.helpers import tiny_recipe
from tests.training.test_loop import RECIPE, d2o, log


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path, RECIPE)


@pytest.fixture
def wandb(monkeypatch):
    """id -> {"config", "steps": {step: values}, "finished"}"""
    runs: dict[str, dict] = {}

    def init(project, name, id, resume, dir, config, settings):
        id = id or f"id{len(runs)}"
        run = runs.setdefault(id, {"project": project, "name": name, "config": config, "steps": {}, "begun": 0})
        run["begun"] += 1
        assert resume == "allow" and Path(dir).is_dir()

        def log(values, step):
            if step >= max(run["steps"], default=0):  # wandb's steps only grow
                run["steps"].setdefault(step, {}).update(values)

        return SimpleNamespace(id=id, log=log, finish=lambda: run.update(finished=True))

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init, Settings=SimpleNamespace))
    return runs


@pytest.fixture
def mlflow(monkeypatch):
    """id -> {"points": {key: [(step, value)]}, "status", "params"}"""
    runs: dict[str, dict] = {}

    class MlflowClient:
        def __init__(self, tracking_uri):
            if tracking_uri == "http://nowhere":
                raise ConnectionError("no such server")

        get_experiment_by_name = lambda self, name: None  # noqa: E731
        create_experiment = lambda self, name: "7"  # noqa: E731

        def create_run(self, experiment, run_name):
            runs[f"run{len(runs)}"] = {"points": {}, "status": "RUNNING", "params": {}, "name": run_name}
            return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(runs) - 1}"))

        def get_run(self, id):
            return SimpleNamespace(
                info=SimpleNamespace(run_id=id), data=SimpleNamespace(metrics={key: 0.0 for key in runs[id]["points"]})
            )

        def get_metric_history(self, id, key):
            return [SimpleNamespace(step=step) for step, _ in runs[id]["points"][key]]

        update_run = lambda self, id, status: runs[id].update(status=status)  # noqa: E731
        log_param = lambda self, id, key, value: runs[id]["params"].update({key: value})  # noqa: E731
        set_terminated = lambda self, id: runs[id].update(status="FINISHED")  # noqa: E731

        def log_batch(self, id, metrics):
            for key, value, _, step in metrics:
                runs[id]["points"].setdefault(key, []).append((step, value))

    entities = SimpleNamespace(Metric=lambda *point: point)
    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow", MlflowClient=MlflowClient, entities=entities))
    return runs


def module(name: str, **content) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


@pytest.mark.long
def test_wandb_gets_the_numbers_of_the_log_and_a_resumed_run_is_the_same_there(recipe, tmp_path, wandb):
    run, track = tmp_path / "run", ("--set", "tracker=wandb", "--set", "optim.schedule=constant")
    assert d2o("train", recipe, "--out", run, *track) == 0
    (only,) = wandb.values()
    assert (
        only["finished"]
        and only["name"] == "test"
        and only["project"] == "d2o"
        and only["config"]["optim"]["lr"] == 1e-3
    )
    assert {step: values["loss"] for step, values in only["steps"].items()} == {
        line["images"]: line["loss"] for line in log(run)
    }
    assert d2o("train", recipe, "--out", run, "--resume", *track, "--set", "images=640") == 0
    assert len(wandb) == 1 and only["begun"] == 2
    assert d2o("train", recipe, "--out", tmp_path / "other", *track) == 0
    assert len(wandb) == 2


def test_mlflow_gets_each_number_once_however_often_the_run_was_resumed(recipe, tmp_path, mlflow):
    said: list[str] = []
    chosen = load_recipe(recipe, ["tracker={name: mlflow, project: p, run: my-run}"])
    quiet = SimpleNamespace(write=lambda *a, **k: None, close=lambda: None)
    first = tracked(quiet, chosen, tmp_path, said.append)
    for i in (1, 2, 3):  # killed after the third
        first.write(i, 16 * i, loss=1 / i, watch="in balance", eval={"fd": 2.0})
    second = tracked(quiet, chosen, tmp_path, said.append)
    for i in (2, 3, 4):  # from its last checkpoint
        second.write(i, 16 * i, loss=1 / i, eval={"fd": 2.0})
    second.close()
    (only,) = mlflow.values()
    assert only["points"]["loss"] == [(16 * i, 1 / i) for i in (1, 2, 3, 4)] and set(only["points"]) == {
        "loss",
        "eval/fd",
    }
    assert (
        only["status"] == "FINISHED"
        and only["name"] == "my-run"
        and only["params"]["optim.lr"] == "0.001"
        and said == []
    )


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(recipe, tmp_path, capsys, monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        assert d2o("train", recipe, "--out", tmp_path / "run", "--set", f"tracker={name}") == 2
        error = capsys.readouterr().err
        assert f"needs the package '{name}'" in error and f"pip install 'd2o[{name}]'" in error
    monkeypatch.setitem(sys.modules, "wandb", module("wandb"))  # what Python makes of a folder of that name
    assert d2o("train", recipe, "--out", tmp_path / "run", "--set", "tracker=wandb") == 2
    assert "only a folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "pairs").exists()
    assert d2o("train", recipe, "--plan", "--set", "tracker=wandb") in (0, 1)  # listed among what is missing
    assert "tracker wandb" in capsys.readouterr().out.replace("\n", " ")
    assert d2o("train", recipe, "--plan", "--set", "tracker=tensorboard") == 2
    assert "expected 'wandb', 'mlflow' or a section" in capsys.readouterr().err


def test_a_tracker_that_cannot_be_reached_is_the_users_to_mend(recipe, tmp_path, mlflow):
    chosen = load_recipe(recipe, ["tracker={name: mlflow, uri: http://nowhere}"])
    with pytest.raises(UserError, match="tracker mlflow: no such server") as error:
        tracked(None, chosen, tmp_path, print)
    assert "tracker=null" in error.value.hint
    (tmp_path / "tracker.json").write_text("{")
    with pytest.raises(UserError, match="tracker.json"):
        tracked(None, load_recipe(recipe, ["tracker=mlflow"]), tmp_path, print)


def test_a_tracker_that_fails_on_the_way_does_not_end_the_run(recipe, tmp_path, wandb, capsys):
    original = sys.modules["wandb"].init

    def failing(**settings):
        def log(values, step):
            raise OSError("the line is dead")

        return SimpleNamespace(id=original(**settings).id, log=log, finish=lambda: None)

    sys.modules["wandb"].init = failing
    run = tmp_path / "run"
    assert d2o("train", recipe, "--out", run, "--set", "tracker=wandb", "--set", "images=64") == 0
    assert capsys.readouterr().err.count("the line is dead") == 1 and len(log(run)) == 2
