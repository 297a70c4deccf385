"""The loop as a user meets it: through the command line, with kills, restarts, several processes and bad luck."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from d2o.cli.app import main
from d2o.interop.safetensors_io import load_file, read_meta
from d2o.methods.base import METHODS
from tests import workers
from tests.helpers import tiny_recipe

RECIPE = """
name: test
method: ode
teacher: {teacher}
pairs: {{path: {pairs}, n: 64, solver: euler, steps: 2, batch: 32, shard_size: 32}}
ode: {{loss: mse}}
optim: {{lr: 1.0e-3, schedule: cosine, warmup: 2}}
ema: {{half_life: 100}}
batch: 16
images: 320
log_every: 2
checkpoint: {{every: 64, keep: 2}}
threads: 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path, RECIPE)


def d2o(*arguments: object) -> int:
    """Run the command in this process; its exit code."""
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


def checkpoint(run: Path, name: str = "last") -> bytes:
    return (run / "checkpoints" / f"{name}.safetensors").read_bytes()


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_run_leaves_everything_needed_to_read_continue_and_repeat_it(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert d2o("train", recipe, "--out", run, "--set", "preview={every: 160, n: 4}") == 0
    assert "pairs" in capsys.readouterr().err
    assert (tmp_path / "pairs" / "manifest.json").exists()
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == [
        "images-000000000256.safetensors",
        "images-000000000320.safetensors",
        "last.safetensors",
        "state.safetensors",
    ]
    assert sorted(p.name for p in (run / "previews").iterdir()) == ["000000000.png", "000000160.png", "000000320.png"]
    lines = log(run)
    assert [line["iteration"] for line in lines] == list(range(2, 21, 2)) and lines[-1]["images"] == 320
    assert lines[-1]["loss"] < lines[0]["loss"] and all(line["images_per_s"] > 0 for line in lines)
    assert list((run / "tensorboard").glob("events*"))
    meta = read_meta(run / "checkpoints" / "last.safetensors")
    assert (
        meta["kind"] == "student" and meta["recipe"]["optim"]["lr"] == 1e-3 and meta["teacher"]["licence"] == "CC0-1.0"
    )
    assert meta["provenance"][0]["method"] == "ode" and meta["images"] == 320
    # recipe.yaml re-runs as it is, to the same bytes
    assert d2o("train", run / "recipe.yaml", "--out", tmp_path / "again") == 0
    assert checkpoint(tmp_path / "again") == checkpoint(run)


@pytest.mark.long
def test_an_existing_run_is_neither_overwritten_nor_mixed(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert d2o("train", recipe, "--out", run) == 0
    before = checkpoint(run)
    assert d2o("train", recipe, "--out", run) == 2 and "holds a run already" in capsys.readouterr().err
    assert d2o("train", recipe, "--out", run, "--resume", "--set", "optim.lr=2e-3") == 2
    assert "optim.lr: 0.001 -> 0.002" in capsys.readouterr().err
    assert d2o("train", recipe, "--out", run, "--resume") == 0 and "finished" in capsys.readouterr().err
    assert checkpoint(run) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    assert d2o("train", recipe, "--out", tmp_path / "other") == 2 and "no run" in capsys.readouterr().err


def begin(recipe: Path, run: Path, *more: str) -> BaseProcess:
    return workers.start(["train", recipe, "--out", run, *more], run.with_suffix(".log"))


def wait_for(path: Path, process: BaseProcess, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end, path
        time.sleep(0.01)


@pytest.mark.long
def test_killed_at_any_moment_a_resumed_run_ends_with_the_same_bytes(recipe, tmp_path):
    longer = ("--set", "images=1280")
    assert d2o("train", recipe, "--out", tmp_path / "whole", *longer) == 0
    run = tmp_path / "killed"
    for marker in ("images-000000000256", "images-000000000512", "images-000000000832"):
        process = begin(recipe, run, "--resume", *longer)
        wait_for(run / "checkpoints" / f"{marker}.safetensors", process)
        process.kill()
        process.join()
    assert d2o("train", recipe, "--out", run, "--resume", *longer) == 0
    for name in ("last", "state"):
        assert checkpoint(run, name) == checkpoint(tmp_path / "whole", name)
    strip = lambda lines: [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]  # noqa: E731
    assert strip(log(run)) == strip(log(tmp_path / "whole"))


def test_sigterm_finishes_the_step_saves_and_says_how_to_continue(recipe, tmp_path):
    run = tmp_path / "run"
    process = begin(recipe, run, "--set", "images=100000")
    wait_for(run / "checkpoints" / "state.safetensors", process)
    process.terminate()
    assert workers.finish(process, 120) == 128 + signal.SIGTERM
    words = run.with_suffix(".log").read_text()
    assert "saved" in words and "--resume" in words and "Traceback" not in words
    record = read_meta(run / "checkpoints" / "state.safetensors")
    assert 0 < record["images"] < 100000
    assert log(run)[-1]["iteration"] == record["iteration"] // 2 * 2  # no line but those that a whole run writes
    assert len(record.get("since", [])) == record["iteration"] % 2


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last.safetensors")[0]


def difference(a: Path, b: Path) -> float:
    x, y = weights(a), weights(b)
    return max((x[k] - y[k]).abs().max().item() for k in x)


@pytest.mark.long
def test_micro_batches_change_nothing(recipe, tmp_path):
    assert d2o("train", recipe, "--out", tmp_path / "a") == 0
    assert d2o("train", recipe, "--out", tmp_path / "b", "--set", "micro_batch=4") == 0
    assert difference(tmp_path / "a", tmp_path / "b") < 1e-5
    assert d2o("train", recipe, "--out", tmp_path / "c", "--set", "micro_batch=5") == 2


@pytest.mark.long
def test_two_processes_give_the_result_of_one(recipe, tmp_path):
    assert d2o("train", recipe, "--out", tmp_path / "one") == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        port,
        "-m",
        "d2o",
    ]
    done = subprocess.run(
        [*torchrun, "train", str(recipe), "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in two], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("setting", ["precision=bf16", "channels_last=true"])
def test_faster_settings_stay_close(recipe, tmp_path, setting):
    assert d2o("train", recipe, "--out", tmp_path / "a") == 0
    assert d2o("train", recipe, "--out", tmp_path / "b", "--set", setting) == 0
    a, b = ([line["loss"] for line in log(tmp_path / name)] for name in "ab")
    assert b[0] == pytest.approx(a[0], rel=0.1) and b[-1] == pytest.approx(a[-1], rel=0.3)


@pytest.mark.long
def test_compiled_training_is_the_same_training(recipe, tmp_path, monkeypatch):
    compiled = []
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kw: (compiled.append(self), original(self, backend="eager"))[1]
    )
    assert d2o("train", recipe, "--out", tmp_path / "a", "--set", "images=64") == 0
    assert d2o("train", recipe, "--out", tmp_path / "b", "--set", "images=64", "--set", "compile=true") == 0
    assert len(compiled) == 1
    assert difference(tmp_path / "a", tmp_path / "b") < 1e-5


class Explodes:
    """A loss that is not finite in iterations 3 and 5."""

    def __init__(self, monkeypatch):
        from d2o.methods import ode

        original = ode.ODE.step

        def step(self, loop, batch, iteration):
            batch.target = batch.target * (float("nan") if iteration in (3, 5) else 1)
            return original(self, loop, batch, iteration)

        monkeypatch.setattr(ode.ODE, "step", step)


def test_bad_gradients_stop_the_run_before_they_are_saved(recipe, tmp_path, monkeypatch, capsys):
    Explodes(monkeypatch)
    run = tmp_path / "run"
    assert d2o("train", recipe, "--out", run) == 2
    assert "not finite (first at iteration 3)" in capsys.readouterr().err
    assert not (run / "checkpoints" / "last.safetensors").exists()


@pytest.mark.long
@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_bad_gradients_can_be_passed_over_and_are_counted(recipe, tmp_path, monkeypatch, policy):
    Explodes(monkeypatch)
    run = tmp_path / "run"
    assert d2o("train", recipe, "--out", run, "--set", f"bad_gradients={policy}") == 0
    assert log(run)[-1]["bad_gradients"] == 2
    assert all(t.isfinite().all() for t in weights(run).values())


@pytest.mark.long
def test_finetune_starts_from_the_student_and_records_where_it_came_from(recipe, tmp_path, capsys):
    assert d2o("train", recipe, "--out", tmp_path / "first") == 0
    again = ["finetune", recipe, "--from", tmp_path / "first", "--set", "ode.loss=l1", "--set", "images=64"]
    assert d2o(*again, "--out", tmp_path / "second") == 0
    meta = read_meta(tmp_path / "second" / "checkpoints" / "last.safetensors")
    assert [entry.get("method") for entry in meta["provenance"]] == ["ode", None, "ode"]
    assert meta["provenance"][1]["recipe"] == "test" and len(meta["provenance"][1]["started_from"]) == 64
    assert log(tmp_path / "second")[0]["loss"] < 1.5 * sum(line["loss"] ** 0.5 for line in log(tmp_path / "first")[-3:])
    assert d2o(*again, "--out", tmp_path / "second", "--resume") == 0
    assert d2o("train", *again[1:2], *again[4:], "--out", tmp_path / "second", "--resume") == 2
    assert "was started from" in capsys.readouterr().err
    assert d2o("finetune", recipe, "--from", tmp_path / "nothing.safetensors", "--out", tmp_path / "third") == 2
    assert not (tmp_path / "third").exists()


def test_mistakes_create_nothing(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    for override, words in (
        ("optim.lrr=1", "did you mean"),
        ("batch=none at all", "batch"),
        ("teacher=digitz", "unknown teacher"),
        ("pairs.solver=hein", "did you mean 'heun'"),
    ):
        assert d2o("train", recipe, "--out", run, "--set", override) == 2
        err = capsys.readouterr().err
        assert words in err and "Traceback" not in err
    assert not run.exists()
    (tmp_path / "file").write_text("")
    assert d2o("train", recipe, "--out", tmp_path / "file" / "run") == 2 and "cannot write" in capsys.readouterr().err


def test_debug_shows_the_traceback(recipe, tmp_path):
    from d2o.errors import UserError

    with pytest.raises(UserError):
        main(["--debug", "train", str(recipe), "--out", str(tmp_path / "r"), "--set", "teacher=digitz"])


def test_plan_prints_and_creates_nothing(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert d2o("train", recipe, "--out", run, "--plan") == 0
    out = capsys.readouterr().out
    for words in (
        "41,329",
        "optimiser (adam)",
        "EMA",
        "activations",
        "making pairs",
        "128",
        "before it begins: the pair store",
        "would start",
    ):
        assert words in out, words
    assert not run.exists() and not (tmp_path / "pairs").exists()
    assert d2o("train", recipe, "--plan", "--set", "teacher=gone.safetensors") == 1
    assert "no such file: gone.safetensors" in capsys.readouterr().out


def test_every_method_has_its_module():
    from d2o.methods.base import Method, Options, get_method

    for name in METHODS:
        assert issubclass(get_method(name), Method) and issubclass(get_method(name).Options, Options)
