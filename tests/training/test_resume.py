"""`--resume`: what a run's folder is brought to, which settings may change, and who may work in it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from d2o.cli.app import main
from d2o.errors import UserError
from d2o.features import base as features
from d2o.interop.safetensors_io import load_file, read_meta, save_file
from d2o.methods.base import METHODS, Setup
from d2o.recipes.changes import forbidden
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.training.checkpoint import load_state, save_state, tensors_of
from d2o.training.loop import Trainer
from d2o.training.run_folder import locked
from tests.helpers import tiny_teacher
from tests.training.kills import RECIPE, Scored, content, log
from tests.workers import CONTEXT


class Student(Scored):
    takes = "edm"

    def describe(self):
        return {"kind": "student", "network": {}}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(METHODS, "tiny-gan", "tests.tiny_gan_method")
    monkeypatch.setitem(sys.modules, "tests.tiny_gan_method", SimpleNamespace(METHOD=Student))
    tiny_teacher(tmp_path / "teacher.safetensors")
    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}teacher: {tmp_path / 'teacher.safetensors'}\n")
    return tmp_path / "recipe.yaml"


def d2o(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


def stop_at(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is asked to stop in that iteration."""
    original = Student.step

    def step(self, loop, batch, iteration):
        if iteration == iterations - 1:
            monkeypatch.setattr(StopFlag, "received", 15)
        return original(self, loop, batch, iteration)

    monkeypatch.setattr(Student, "step", step)


def stopped(recipe: Path, run: Path, iterations: int, *more: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(iterations, patch)
        assert d2o("train", recipe, "--out", run, *more) == 143


def file(run: Path, name: str) -> Path:
    return run / "checkpoints" / f"{name}.safetensors"


@pytest.mark.parametrize("iterations", [1, 3, 8, 11, 19])
def test_stopped_and_continued_a_run_leaves_what_a_whole_one_leaves(recipe, tmp_path, iterations):
    assert d2o("train", recipe, "--out", tmp_path / "whole") == 0
    stopped(recipe, tmp_path / "parts", iterations)
    assert d2o("train", recipe, "--out", tmp_path / "parts", "--resume") == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_finished_run_is_brought_to_its_state(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert d2o("train", recipe, "--out", run) == 0
    whole = content(run)
    again = ["train", recipe, "--out", run, "--resume"]
    file(run, "last").unlink()  # removed
    assert d2o(*again) == 0 and content(run) == whole
    file(run, "last").write_bytes(file(run, "images-000000000160").read_bytes())  # of an earlier state
    file(run, "images-000000000120").write_bytes(b"a snapshot that should be gone")
    file(run, "last").with_suffix(".safetensors.next").write_bytes(b"of a killed process")
    (run / ".recipe.yaml.x1y2z3.tmp").write_bytes(b"of a killed process")
    assert d2o(*again) == 0 and content(run) == whole
    capsys.readouterr()
    assert d2o(*again) == 0 and content(run) == whole and "finished" in capsys.readouterr().err
    # what no state can give back is named, and nothing else is touched
    file(run, "best").unlink()
    file(run, "last").unlink()
    assert d2o(*again) == 0
    assert "best: removed or changed since the run wrote it" in capsys.readouterr().err
    assert content(run) == {name: data for name, data in whole.items() if "best" not in name}


def test_a_state_of_an_older_version_resumes(recipe, tmp_path):
    assert d2o("train", recipe, "--out", tmp_path / "whole") == 0
    run = tmp_path / "old"
    stopped(recipe, run, 11)
    tensors, record = load_file(file(run, "state"))
    old = {key: value for key, value in record.items() if key not in ("products", "since", "watch", "divergence")}
    old["watch"] = {"state": record["watch"]["state"], "since": [dict(row) for row in record["since"]]}
    save_file(file(run, "state"), tensors, old)
    assert d2o("train", recipe, "--out", run, "--resume") == 0
    whole = {
        **content(tmp_path / "whole"),
        "metrics.jsonl": log(tmp_path / "whole"),
    }  # that state knew no order of scalars
    assert {**content(run), "metrics.jsonl": log(run)} == whole
    # finished, with a `last` that is of the checkpoint before: as an older version left it when it was killed there
    tensors, record = load_file(file(run, "state"))
    save_file(file(run, "state"), tensors, {key: value for key, value in record.items() if key != "products"})
    file(run, "last").write_bytes(file(run, "images-000000000160").read_bytes())
    assert d2o("train", recipe, "--out", run, "--resume") == 0
    assert {**content(run), "metrics.jsonl": log(run)} == whole


def test_a_damaged_or_missing_state_is_refused_with_the_way_on(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    stopped(recipe, run, 11)
    whole = file(run, "state").read_bytes()
    again = ["train", recipe, "--out", run, "--resume"]
    for damage in (whole[:-20] + b"\1" + whole[-19:], whole[:-20], b""):
        file(run, "state").write_bytes(damage)
        before = content(run)
        assert d2o(*again) == 2
        said = capsys.readouterr().err
        assert str(file(run, "state")) in said and f"d2o finetune RECIPE --from {file(run, 'last')}" in said
        assert content(run) == before
    file(run, "state").unlink()
    assert d2o(*again) == 2
    assert "no state.safetensors to continue from" in capsys.readouterr().err and file(run, "last").exists()
    file(run, "state").write_bytes(whole)
    assert d2o(*again) == 0


@pytest.mark.long
def test_what_does_not_change_the_past_may_change(recipe, tmp_path, capsys):
    longer = tmp_path / "longer"
    assert d2o("train", recipe, "--out", longer, "--set", "images=320") == 0
    run = tmp_path / "run"
    stopped(recipe, run, 9)
    changes = ["--set", "log_every=3", "--set", "eval.every=16", "--set", "checkpoint={every: 32, keep: 1}"]
    assert d2o("train", recipe, "--out", run, "--resume", *changes) == 0
    assert [line["iteration"] for line in log(run) if "eval" not in line] == [4, 8, *range(12, 22, 3)]
    # a finished run too: its weights are those of a run that was as long from the start
    assert d2o("train", recipe, "--out", run, "--resume", *changes, "--set", "images=320") == 0
    assert "changed: images: 168 -> 320" in capsys.readouterr().err
    tensors, expected = (load_file(file(folder, "state"))[0] for folder in (run, longer))
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in tensors)
    head = [line for line in (run / "recipe.yaml").read_text().splitlines() if line.startswith("#")]
    assert head == [
        "# changed after 72 images: log_every: 4 -> 3",
        "# changed after 72 images: eval.every: 24 -> 16",
        "# changed after 72 images: checkpoint.every: 40 -> 32",
        "# changed after 72 images: checkpoint.keep: 2 -> 1",
        "# changed after 168 images: images: 168 -> 320",
    ]
    assert load_recipe(str(run / "recipe.yaml")).images == 320
    assert sorted(path.stem for path in (run / "checkpoints").glob("images-*")) == ["images-000000000320"]


def test_another_measure_starts_another_best(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped(recipe, run, 15)
    assert read_meta(file(run, "state"))["best"]["accuracy"] > -0.6
    monkeypatch.setattr(Student, "validate", lambda self, product: {"accuracy": -5.0})
    assert d2o("train", recipe, "--out", run, "--resume", "--set", "eval.seed=1") == 0
    assert read_meta(file(run, "state"))["best"]["accuracy"] == -5.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lr=0.1", "optim.lr: 0.05 -> 0.1"),
        ("batch=4", "batch: 8 -> 4"),
        ("seed=3", "seed: 0 -> 3"),
        ("images=40", "images: 168 -> 40: 88 are trained already"),
    ],
)
def test_what_changes_the_past_is_refused_with_the_way_on(recipe, tmp_path, capsys, change, words):
    run = tmp_path / "run"
    stopped(recipe, run, 11)
    before = content(run)
    assert d2o("train", recipe, "--out", run, "--resume", "--set", change) == 2
    said = capsys.readouterr().err
    assert words in said and f"d2o finetune RECIPE --from {run} --out ANOTHER" in said
    assert content(run) == before


def test_only_a_constant_learning_rate_may_grow_longer():
    def resolved(images, **optim):
        return {
            "images": images,
            "optim": {"schedule": "constant", "lr": 1.0, **optim},
            "optim_critic": None,
            "log_every": 3,
            "eval": None,
        }

    assert forbidden(resolved(100), resolved(200), 100) == [] == forbidden(resolved(100), resolved(50), 50)
    assert forbidden(resolved(100), {**resolved(100), "log_every": 5, "eval": {"every": 3}}, 100) == []
    for course in ("cosine", "linear"):
        [line] = forbidden(resolved(100, schedule=course), resolved(200, schedule=course), 100)
        assert line.startswith("images: 100 -> 200") and f"optim.schedule: {course}" in line
    critic = {**resolved(100), "optim_critic": {"schedule": "linear"}}
    assert "optim_critic.schedule: linear" in forbidden(critic, {**critic, "images": 200}, 0)[0]


def test_the_curves_of_tensorboard_survive_a_resume(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, loaded = tmp_path / "run", load_recipe(recipe)

    class Killed(Exception):
        pass

    def train(until: int) -> None:
        trainer = Trainer(loaded, Setup(loaded.options), run)
        trainer.resume()
        original = trainer.method.step

        def step(loop, batch, iteration):
            if iteration == until:
                raise Killed  # lines 12 and 16 are written, the newest state is of iteration 10
            return original(loop, batch, iteration)

        trainer.method.step = step
        trainer.run(lambda done, note: None, StopFlag())

    run.mkdir()
    for until in (2, 17):  # before the first state, and after
        with pytest.raises(Killed):
            train(until)
    train(-1)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    lines = [line for line in log(run) if "loss_g" in line]
    assert [(event.step, pytest.approx(event.value)) for event in board.Scalars("loss_g")] == [
        (line["images"], line["loss_g"]) for line in lines
    ]
    assert [line["iteration"] for line in lines] == [4, 8, 12, 16, 20, 21]


def hold(folder: str, ready, leave) -> None:
    with locked(Path(folder)):
        ready.set()
        leave.wait(30)


def test_two_trainings_of_one_folder_are_refused(recipe, tmp_path, capsys):
    run, ready, leave = tmp_path / "a" / "run", CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(str(run), ready, leave))
    process.start()
    assert ready.wait(60)
    for more in ([], ["--resume"]):
        assert d2o("train", recipe, "--out", run, *more) == 2
        assert f"another process is training in {run}" in capsys.readouterr().err
    assert list(run.iterdir()) == []  # no file tells of the lock
    process.kill()  # and a killed process holds it no longer
    process.join()
    assert d2o("train", recipe, "--out", run) == 0


def test_a_folder_that_was_made_and_not_used_goes_again(tmp_path):
    with pytest.raises(UserError), locked(tmp_path / "a" / "b"):
        raise UserError("refused")
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("")
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_folder_that_is_no_run_is_left_as_it_is(recipe, tmp_path, capsys):
    for name in (".notes.txt.abc.tmp", "evaluation/mine.txt", "checkpoints/.x.tmp", "previews/5.png"):
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text("precious")
    before = content(tmp_path / "other")
    for more in ([], ["--resume"], ["--sweep", "optim.lr=0.1,0.2"]):
        assert d2o("train", recipe, "--out", tmp_path / "other", *more) == 2
        assert "holds other files" in capsys.readouterr().err
    assert content(tmp_path / "other") == before


def test_a_log_that_cannot_be_written_anew_is_not_lost(recipe, tmp_path, monkeypatch):
    run, loaded = tmp_path / "run", load_recipe(recipe)
    stopped(recipe, run, 11)
    before = (run / "metrics.jsonl").read_bytes() + b'{"iteration": 12, "images": 96}\n{"iterat'
    (run / "metrics.jsonl").write_bytes(before)
    import d2o.interop.safetensors_io as files

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        trainer = Trainer(loaded, Setup(loaded.options), run)
        trainer.iteration = 10
        with pytest.raises(UserError, match="disk is full"):
            trainer.run(lambda done, note: None, StopFlag())
    assert (run / "metrics.jsonl").read_bytes() == before
    assert d2o("train", recipe, "--out", run, "--resume") == 0
    assert [line["iteration"] for line in log(run) if "eval" not in line] == [4, 8, 12, 16, 20, 21]


def test_frozen_batch_norms_beside_trained_weights_come_back(tmp_path: Path) -> None:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(features.hold(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))), nn.BatchNorm2d(4))

    before, after = network(0), network(1)
    before(torch.randn(2, 1, 8, 8))
    tensors = tensors_of({}, {"critic": before})
    assert "network/critic/1.num_batches_tracked" in tensors and not any("critic/0." in name for name in tensors)
    save_state(tmp_path / "state.safetensors", tensors, {"iteration": 1, "images": 2})
    load_state(tmp_path / "state.safetensors", {}, {"critic": after})
    found = after.state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.state_dict().items()) and len(found) == 5


def test_images_may_lie_elsewhere_and_must_be_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 255, (32, 8, 8, 1), dtype=np.uint8)
    for name, pixels in (("one", images), ("other", images[::-1])):
        np.savez(tmp_path / f"{name}.npz", images=pixels, labels=np.arange(32) % 10)
    run, again = tmp_path / "run", tmp_path / "moved.npz"
    small = ["--set", "batch=8", "--set", "images=32", "--set", "log_every=1", "--out", run]
    command = ["train", "teacher_cifar16", "--mini", "--set", "preview=null", *small]
    with pytest.MonkeyPatch.context() as patch:
        iterate = Trainer.iterate
        patch.setattr(Trainer, "iterate", lambda t: patch.setattr(StopFlag, "received", 15) or iterate(t))
        assert d2o(*command, "--data", tmp_path / "one.npz") == 143
    capsys.readouterr()
    assert d2o(*command, "--data", tmp_path / "other.npz", "--resume") == 2
    assert f"{run} was trained on other images than there are now" in capsys.readouterr().err
    (tmp_path / "one.npz").rename(again)
    assert d2o(*command, "--data", again, "--resume") == 0
    assert "data.path: " in (run / "recipe.yaml").read_text().splitlines()[0]
    assert read_meta(run / "checkpoints" / "last.safetensors")["images"] == 32
