"""`auto` in a recipe: chosen once, said, recorded in the run's recipe.yaml, and nothing else is changed by the
choosing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2o.interop.safetensors_io import read_meta
from d2o.methods.base import Setup
from d2o.networks import processor
from d2o.recipes.load import load_recipe
from d2o.training.choices import as_begun
from d2o.training.cpu_threads import measure
from d2o.training.loop import Trainer
from tests.helpers import tiny_recipe
from tests.training.test_loop import RECIPE, checkpoint, d2o
from tests.training.test_two_networks import recipe as gan  # noqa: F401


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path, RECIPE.replace("threads: 1\n", "").replace("images: 320", "images: 64"))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
def test_what_auto_took_is_recorded_repeats_and_holds_on_other_machines(recipe, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    auto = ("--precision", "auto", "--set", "threads=1", "--seed", "5")
    monkeypatch.setattr(processor, "bf16_unit", lambda device: "AMX")
    monkeypatch.setattr(processor, "WIDE", 1000)
    assert d2o("train", recipe, "--out", run, *auto) == 0
    assert "precision bf16 (auto: AMX computes in bf16)" in capsys.readouterr().err
    chosen = load_recipe(run / "recipe.yaml")
    assert (chosen.precision, chosen.channels_last, chosen.seed) == ("bf16", True, 5)
    assert read_meta(run / "checkpoints" / "last.safetensors")["recipe"]["channels_last"] is True
    monkeypatch.setattr(processor, "bf16_unit", lambda device: None)
    monkeypatch.setattr(processor, "WIDE", 10**9)
    before = checkpoint(run)
    (
        run / "checkpoints" / "last.safetensors"
    ).unlink()  # killed at its end, and resumed where the choice would be another
    assert d2o("train", recipe, "--out", run, "--resume", *auto) == 0
    assert checkpoint(run) == before and load_recipe(run / "recipe.yaml") == chosen
    assert (
        d2o("train", recipe, "--out", run, "--resume", "--precision", "fp32", "--set", "threads=1", "--seed", "5") == 2
    )
    assert "precision: bf16 -> fp32" in capsys.readouterr().err
    assert (
        d2o("train", run / "recipe.yaml", "--out", tmp_path / "again") == 0
    )  # the recorded recipe gives the same bytes
    assert checkpoint(tmp_path / "again") == before
    assert d2o("train", recipe, "--out", tmp_path / "third", *auto) == 0
    other = load_recipe(tmp_path / "third" / "recipe.yaml")
    assert (other.precision, other.channels_last) == ("fp32", False)


def test_seed_and_precision_are_checked_as_options(recipe, tmp_path, capsys):
    assert d2o("train", recipe, "--out", tmp_path / "run", "--precision", "fp8") == 2
    assert "unknown precision 'fp8'" in capsys.readouterr().err
    assert d2o("finetune", recipe, "--from", tmp_path, "--seed", "-1") == 2
    assert not (tmp_path / "run").exists()


def test_as_begun_replaces_auto_and_nothing_else(recipe):
    begun = load_recipe(recipe, ["precision=bf16", "threads=3", "channels_last=true"])
    assert as_begun(load_recipe(recipe, ["precision=auto", "threads=auto"]), begun) == begun
    other = load_recipe(recipe, ["precision=fp16", "threads=2", "channels_last=false"])
    assert as_begun(other, begun) == other and as_begun(other, None) is other


@pytest.mark.long
def test_threads_auto_measures_keeps_and_trains_as_if_the_number_had_been_given(recipe, tmp_path, capsys, two_threads):
    assert d2o("train", recipe, "--out", tmp_path / "auto", "--set", "threads=auto") == 0
    said = capsys.readouterr().err
    assert "images/s" in said and "threads " in said
    threads = load_recipe(tmp_path / "auto" / "recipe.yaml").threads
    assert threads in (1, 2) and torch.get_num_threads() == threads
    assert d2o("train", recipe, "--out", tmp_path / "given", "--set", f"threads={threads}") == 0
    for name in ("last", "state"):
        assert checkpoint(tmp_path / "auto", name) == checkpoint(tmp_path / "given", name)


def test_measuring_leaves_a_trainer_of_two_networks_as_it_was(gan, tmp_path, two_threads):  # noqa: F811
    def run(measured: bool) -> dict:
        recipe, folder = gan("images=640"), tmp_path / str(measured)
        folder.mkdir()
        trainer = Trainer(recipe, Setup(recipe.options), folder)
        if measured:
            torch.manual_seed(0)
            assert set(measure(trainer, (1, 2))) == {1, 2} and trainer.iteration == 0
        torch.set_num_threads(1)
        while trainer.iteration < 10:
            trainer.method.step(trainer, trainer.batches.get(trainer.iteration), trainer.iteration)
            trainer.iteration += 1
        return {
            f"{name}/{key}": value
            for name, net in {**trainer.networks, "ema": trainer.ema.network}.items()
            for key, value in net.state_dict().items()
        }

    plain, after = run(False), run(True)
    assert plain.keys() == after.keys() and all(torch.equal(plain[key], after[key]) for key in plain)
