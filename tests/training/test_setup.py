"""What a recipe is turned into before the first iteration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.teachers import generate, registry
from d2o.training import setup
from tests.helpers import tiny_recipe, tiny_teacher

RECIPE = """
name: test
method: ode
teacher: {teacher}
pairs: {{path: {pairs}, n: 8, solver: euler, steps: 2, batch: 8, shard_size: 8}}
ode: {{loss: mse}}
optim: {{lr: 1.0e-3}}
batch: 4
images: 8
threads: 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tiny_recipe(tmp_path, RECIPE)


def test_the_teacher_is_loaded_once_though_pairs_are_made(recipe, monkeypatch):
    loaded = []

    def load(name: str, *rest, **more):
        loaded.append(name)
        return registry.load_teacher(name, *rest, **more)

    for module in (setup, generate):
        monkeypatch.setattr(module, "load_teacher", load)
    made = setup.prepare(load_recipe(recipe), torch.device("cpu"), None, print, lambda *_: None, StopFlag())
    assert len(loaded) == 1 and len(made.pairs) == 8 and made.teacher.network is not None


def test_previews_are_of_the_solver_that_is_learned(recipe):
    """That of the pairs; where these say none, or are stochastic, or there are none, the teacher's own."""
    teacher = tiny_teacher()
    own = teacher.solver()
    assert (own.name, own.steps) != ("euler", 2)

    def learned(*changes: str) -> tuple[str, int]:
        solver = setup.learned_solver(load_recipe(recipe, list(changes)), teacher)
        return solver.name, solver.steps

    assert learned() == ("euler", 2)
    assert learned("pairs.solver=null", "pairs.steps=null") == (own.name, own.steps)
    assert learned("pairs.solver=null", "pairs.steps=3") == (own.name, 3)
    assert learned("method=sid", "pairs=null", "ode=null", "student={sigma: 2.5}") == (own.name, own.steps)
    assert learned("pairs.solver=ddim", "pairs.eta=1.0") == (own.name, own.steps)
    assert setup.learned_solver(load_recipe(recipe), None) is None
