"""A run that is lost says so, ends with exit code 2, and keeps what it saved before."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2o.cli.app import main
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file
from d2o.methods.base import METHODS, Setup
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.training.divergence import BAD, DOUBT, PATIENCE, Divergence, check_weights
from d2o.training.loop import Trainer
from tests.helpers import tiny_recipe
from tests.training.kills import content
from tests.training.test_two_networks import TinyGAN

NAN = float("nan")
RECIPE = """
name: test
method: ode
teacher: {teacher}
pairs: {{path: {pairs}, n: 32, solver: euler, steps: 2, batch: 32, shard_size: 32}}
optim: {{lr: 1.0e-3}}
batch: 16
images: 1600
log_every: 5
checkpoint: {{every: 80, keep: 1}}
threads: 1
"""
GAN = """
name: gan
method: tiny-gan
optim: {lr: 0.05}
batch: 8
images: 160
log_every: 4
bad_gradients: zero
checkpoint: {every: 32, keep: 2}
threads: 1
"""


def d2o(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


def finite(path: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in load_file(path)[0].values())


def see(divergence: Divergence, pattern: list[bool], start: int = 0, every: int = 7) -> Divergence:
    rows = [{"loss": NAN if bad else 1.0} for bad in pattern]
    for at in range(0, len(rows), every):
        part = rows[at : at + every]
        divergence.see(start + at + len(part), part)
    return divergence


def test_more_bad_iterations_than_good_ones_stop_a_run_and_outliers_do_not():
    lost = see(Divergence(), [False] * 200 + [True] * PATIENCE)
    with pytest.raises(UserError, match="since iteration 200 most steps"):
        lost.check(250, False, "skip", 40)
    mostly = see(Divergence(), [False] * 100 + [True, True, False] * PATIENCE)
    with pytest.raises(UserError, match="those of iteration 40"):
        mostly.check(250, False, "skip", 40)
    for pattern in (
        [True, False, False] * 200,
        [False] * 100 + [True] * (PATIENCE - 1) + [False] * 100 + [True] * (PATIENCE - 1),
    ):
        see(Divergence(), pattern).check(600, True, "skip", None)
    resumed = see(Divergence(see(Divergence(), [True] * 30).state), [True] * 20, start=30)
    assert resumed.state == see(Divergence(), [True] * 50).state and resumed.state["since"] == 0
    short = see(Divergence(), [False] * 4 + [True] * 6)
    short.check(10, False, "zero", None)
    with pytest.raises(UserError, match="in 6 of 10 iterations"):
        short.check(10, True, "zero", None)


def test_gradients_count_as_losses_do_and_other_scalars_do_not():
    divergence = Divergence()
    divergence.see(3, [{"loss": 1.0, BAD: 1.0}, {"loss": 1.0, BAD: 0.0, "diversity": NAN}, {"loss_g": float("inf")}])
    assert divergence.state["bad"] == 2


def test_weights_that_are_not_finite_are_named():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    check_weights({"a": a, "b": b}, 5, None)
    with torch.no_grad():
        b.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"after iteration 5 weights are not finite \(b\)"):
        check_weights({"a": a, "b": b}, 5, None)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["skip", "zero"])
@pytest.mark.parametrize("images", [160, 1600])
def test_a_learning_rate_that_is_far_too_high_ends_in_words(tmp_path, capsys, policy, images):
    run = tmp_path / "run"
    command = [
        "train",
        tiny_recipe(tmp_path, RECIPE),
        "--out",
        run,
        "--set",
        "optim.lr=1e6",
        "--set",
        f"bad_gradients={policy}",
        "--set",
        f"images={images}",
    ]
    for more in ([], ["--resume"]):
        assert d2o(*command, *more) == 2
        said = capsys.readouterr().err
        assert "training has diverged" in said and "optim.lr" in said and f"bad_gradients: {policy}" in said
        assert "since iteration 1 " in said if images > 160 else "in 9 of 10 iterations" in said
        for path in (run / "checkpoints").glob("*.safetensors"):
            assert finite(path)
        assert not list(run.rglob("*.tmp")) and not list(run.rglob("*.next"))


def test_under_raise_it_ends_at_the_first_line(tmp_path, capsys):
    assert d2o("train", tiny_recipe(tmp_path, RECIPE), "--out", tmp_path / "run", "--set", "optim.lr=1e6") == 2
    assert "not finite (first at iteration 1)" in capsys.readouterr().err


class Explodes(TinyGAN):
    """A generator whose weights leave the numbers in iteration 13 while its gradients stay finite."""

    def step(self, loop, batch, iteration):
        result = super().step(loop, batch, iteration)
        if iteration == 13:
            with torch.no_grad():
                self.generator.bias += float("inf")
        return result


@pytest.fixture
def gan(tmp_path, monkeypatch):
    def train(method: type, folder: Path, *overrides: str) -> Trainer:
        monkeypatch.setitem(METHODS, "tiny-gan", "tests.tiny_gan_method")
        monkeypatch.setitem(sys.modules, "tests.tiny_gan_method", SimpleNamespace(METHOD=method))
        (tmp_path / "gan.yaml").write_text(GAN)
        recipe = load_recipe(tmp_path / "gan.yaml", list(overrides))
        folder.mkdir(exist_ok=True)
        trainer = Trainer(recipe, Setup(recipe.options), folder)
        trainer.resume()
        trainer.run(lambda done, note: None, StopFlag())
        return trainer

    return train


def test_no_checkpoint_is_written_over_by_one_that_is_not_finite(gan, tmp_path):
    with pytest.raises(
        UserError, match=r"after iteration 16 weights are not finite .*generator.*\n.*those of iteration 12"
    ):
        gan(Explodes, tmp_path / "run")
    whole = tmp_path / "whole"
    gan(TinyGAN, whole, "images=96")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert all(finite(tmp_path / "run" / "checkpoints" / name) for name in names)


def test_a_score_of_weights_that_are_not_finite_is_not_asked_for_and_nan_is_no_best(gan, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        TinyGAN, "validate", lambda self, product: asked.append(1) or {"accuracy": NAN if len(asked) < 3 else 0.5}
    )
    more = ["eval={every: 32, metric: accuracy}", "checkpoint.every=1000"]
    trainer = gan(TinyGAN, tmp_path / "run", *more)
    assert trainer.best == {"accuracy": 0.5, "iteration": 12, "images": 96} and len(asked) == 5
    with pytest.raises(UserError, match="weights are not finite"):
        gan(Explodes, tmp_path / "other", *more)
    assert len(asked) == 8  # at 4, 8 and 12, not at 16


class Stumbles(TinyGAN):
    """Some iterations in a row without a finite loss."""

    def step(self, loop, batch, iteration):
        result = super().step(loop, batch, iteration)
        return {"loss": result["loss"] * (NAN if 6 <= iteration < 6 + DOUBT + 4 else 1)}


@pytest.mark.long
def test_checkpoints_wait_while_a_run_is_in_doubt_and_a_resumed_run_agrees(gan, tmp_path):
    gan(Stumbles, tmp_path / "whole", "images=480")
    names = sorted(path.stem for path in (tmp_path / "whole" / "checkpoints").glob("images*"))
    assert names == ["images-000000000448", "images-000000000480"]
    state = load_file(tmp_path / "whole" / "checkpoints" / "state.safetensors")[1]
    assert state["divergence"] == {"bad": DOUBT + 4, "excess": 0, "since": 6}

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = Stumbles.step
        patch.setattr(
            Stumbles,
            "step",
            lambda *a: (seen.append(1), setattr(StopFlag, "received", 15 if len(seen) == 18 else 0), original(*a))[2],
        )
        with pytest.raises(Exception, match="stopped after 144 images"):
            gan(Stumbles, tmp_path / "parts", "images=480", "checkpoint.keep=9")
    StopFlag.received = 0
    names = sorted(path.stem for path in (tmp_path / "parts" / "checkpoints").glob("images*"))
    assert names == ["images-000000000032", "images-000000000064", "images-000000000096"]  # 128 was in doubt
    gan(Stumbles, tmp_path / "parts", "images=480")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
