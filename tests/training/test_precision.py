"""fp16 with loss scaling: overflow costs an update and nothing else, small gradients survive, and a resumed run has the
same scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2o.interop.safetensors_io import read_meta
from d2o.training.precision import GROWTH, LOWEST, START, LossScale
from tests.helpers import tiny_recipe
from tests.training.test_loop import RECIPE, checkpoint, d2o, log
from tests.training.test_two_networks import recipe as gan  # noqa: F401
from tests.training.test_two_networks import train


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path, RECIPE)


def gradients(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value, 1.0]) for value in values]


def test_gradients_that_fp16_would_round_to_nothing_survive():
    def gradient(scale: LossScale) -> torch.Tensor:
        w = torch.ones(3, requires_grad=True)
        scale.scaled(w.half().float().sum() * 1e-9).backward()  # the gradient passes through half precision
        assert w.grad is not None and scale.unscale([w.grad])
        return w.grad

    assert (gradient(LossScale("fp32")) == 0).all()
    torch.testing.assert_close(gradient(LossScale("fp16")), torch.full((3,), 1e-9), rtol=2e-3, atol=0)


def test_an_overflow_leaves_the_update_out_and_halves_the_scale_at_the_end_of_the_iteration():
    scale = LossScale("fp16")
    assert (
        not scale.unscale(gradients(float("inf"))) and scale.scale == START
    )  # the other players of the iteration have the old one
    assert scale.unscale(gradients(1.0))
    scale.end_iteration()
    assert scale.scale == START / 2
    for _ in range(GROWTH):
        assert scale.scale == START / 2 and scale.unscale(gradients(1.0))
        scale.end_iteration()
    assert scale.scale == START


def test_at_the_lowest_scale_bad_gradients_are_bad_gradients():
    scale = LossScale("fp16")
    while scale.scale > LOWEST:
        assert not scale.unscale(gradients(float("nan")))
        scale.end_iteration()
    assert scale.unscale(gradients(float("nan")))  # bad_gradients decides


def test_other_precisions_are_left_alone():
    scale, loss, bad = LossScale("bf16"), torch.tensor(2.0), gradients(float("inf"))
    assert scale.scaled(loss) is loss and scale.unscale(bad) and scale.record() == {}
    scale.end_iteration()
    assert scale.scale == START


@pytest.mark.long
def test_fp16_trains_like_fp32_and_overflow_is_no_bad_gradient(recipe, tmp_path):
    assert d2o("train", recipe, "--out", tmp_path / "a") == 0
    assert d2o("train", recipe, "--out", tmp_path / "b", "--precision", "fp16", "--set", "bad_gradients=raise") == 0
    a, b = ([line["loss"] for line in log(tmp_path / name)] for name in "ab")
    assert b[0] == pytest.approx(a[0], rel=0.1) and b[-1] == pytest.approx(a[-1], rel=0.5)
    assert all(line["loss_scale"] >= 1 for line in log(tmp_path / "b")) and "loss_scale" not in log(tmp_path / "a")[0]
    record = read_meta(tmp_path / "b" / "checkpoints" / "state.safetensors")
    assert record["loss_scale"]["scale"] == log(tmp_path / "b")[-1]["loss_scale"] and record["bad_gradients"] == {
        "student": 0
    }


@pytest.mark.long
def test_two_players_in_fp16_resume_to_the_same_bytes(gan, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("d2o.training.precision.START", 2.0**24)  # overflows: the first updates are left out
    monkeypatch.setattr("d2o.training.precision.GROWTH", 7)
    fp16 = gan("precision=fp16", "images=6400")
    whole = train(fp16, tmp_path / "whole")
    assert 1 < whole.loss_scale.scale < 2.0**24
    for name, network in whole.networks.items():
        assert all(p.isfinite().all() for p in network.parameters()), name
    first = train(fp16, tmp_path / "cut", 30)
    assert train(fp16, tmp_path / "cut").iteration == whole.iteration
    assert first.loss_scale.scale != START
    for name in ("last", "state"):
        assert checkpoint(tmp_path / "cut", name) == checkpoint(tmp_path / "whole", name)
