"""Every variant of Diffusion2GAN in small, which the table `d2g_mini` names, trains."""

from __future__ import annotations

import functools

import pytest
import torch

from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.load import load_recipe
from d2o.reports.paper_tables import load_table
from d2o.runtime import StopFlag
from d2o.students.base import load_student
from d2o.training import setup as training_setup
from d2o.training.loop import Trainer
from d2o.training.setup import prepare
from tests.helpers import but_for

NAMES = [name for name in recipe_names() if name.partition(":")[0] == "d2g_tiny_sd"]
BEYOND = {f"d2g_tiny_sd:{variant}" for variant in ("cfg_gan", "real", "2steps", "4steps")}
"""Beyond the paper, and not in the table."""


def test_the_table_names_what_is_there():
    rows = [row for row in load_table("d2g_mini").rows if row.recipe]
    assert {row.recipe for row in rows} == {*NAMES} - BEYOND
    for row in rows:  # stage 2 begins from stage 1, everything else from the teacher
        recipe = load_recipe(row.recipe)
        second = recipe.images == 9_600
        assert row.start == ("runs/d2g_tiny_sd" if second else None) and (recipe.optim.lr < 1e-4) == second
        told = row.recipe == "d2g_tiny_sd:cfg"  # of all guidance scales
        assert told or recipe.pairs.cfg in (row.options.cfg, load_table("d2g_mini").options.cfg)
    assert find_recipe("d2g_tiny_sd").path.exists()


def test_lite0_judges_the_same_runs():
    rows = {row.name: row for row in load_table("d2g_mini").rows}
    judged = load_table("d2g_mini_lite0").rows
    assert {"Table 1: MSE", "Table 2: + R1"} <= {row.name for row in judged}
    for row in judged:
        same = rows[row.name.removesuffix(" (flattered)")]
        assert (row.x, row.recipe, row.start) == (same.x, same.recipe, same.start), row.name
        assert ("lite0" in load_recipe(row.recipe).name) == row.name.endswith("(flattered)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("d2g")


@pytest.fixture(scope="module", autouse=True)
def one_teacher():
    """It is frozen: all learn from the same one, loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_setup, "load_teacher", functools.cache(training_setup.load_teacher))
        yield


@pytest.mark.parametrize("name", but_for({"d2g_tiny_sd", "d2g_tiny_sd:gan"}.__contains__, NAMES))
def test_it_trains(name, folder):
    """Two iterations, of which the second one's R1 is not due."""
    few = ["batch=2", "images=4", "pairs.n=4", "pairs.steps=2", "preview=null", "checkpoint.every=4", "log_every=1"]
    store = folder / f"pairs-{load_recipe(name).pairs.cfg}"
    recipe = load_recipe(name, [*few, "threads=1", f"pairs.path={store}"], mini=True)
    setup = prepare(recipe, torch.device("cpu"), None, lambda *_: None, lambda *_: None, StopFlag())
    run = folder / recipe.name
    run.mkdir()
    trainer = Trainer(recipe, setup, run)
    trainer.run(lambda *_: None, StopFlag())
    assert ("critic" in trainer.players) == (recipe.options.lambda_gan > 0)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(lines) == 2 and not any(word in line for line in lines for word in ("NaN", "Infinity"))
    assert load_student(run / "checkpoints" / "last.safetensors").nfe == recipe.student.steps
