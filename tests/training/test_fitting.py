"""How an iteration fits machines: samples that a loss takes together, recomputed activations, methods without data."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from d2o.errors import UserError
from d2o.methods.base import METHODS, Setup
from d2o.networks.build import set_checkpointing
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.runtime import StopFlag
from d2o.training.loop import Trainer
from d2o.training.setup import prepare
from d2o.training.share import divide
from tests.helpers import tiny_network, tiny_teacher
from tests.training.test_two_networks import TinyGAN

RECIPE = """
name: t
method: tiny-gan
optim: {lr: 0.05}
batch: 24
images: 240
log_every: 10
threads: 1
"""


class Pooled(TinyGAN):
    """Takes four samples in a row together, and notes what it was given."""

    takes = "edm"
    seen: list[tuple[int, int, torch.Tensor]] = []

    @classmethod
    def micro_multiple(cls, options, batch):
        return 4

    def step(self, loop, batch, iteration):
        for part, draw in loop.micro_batches(batch):
            assert (len(part.condition), part.noise, part.images) == (0, None, None)
            Pooled.seen.append((draw.start, draw.count, draw.randint(0, 10)))
        return super().step(loop, batch, iteration)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "tiny-gan", "tests.tiny_gan_method")
    monkeypatch.setitem(sys.modules, "tests.tiny_gan_method", SimpleNamespace(METHOD=Pooled))
    (tmp_path / "t.yaml").write_text(RECIPE)
    return lambda *overrides: load_recipe(tmp_path / "t.yaml", list(overrides))


def test_micro_batches_are_multiples_of_what_a_loss_takes_together(recipe):
    assert divide(recipe()) == ((0, 24), 24) and divide(recipe("micro_batch=8"), 1, 3) == ((8, 16), 8)
    assert divide(recipe("micro_batch=20"), 0, 3) == ((0, 8), 8)  # no smaller than the share: as if it were not given
    for overrides, world, words in (
        (["micro_batch=6"], 1, "micro_batch: method tiny-gan takes 4 samples in a row together, and 6 is no multiple"),
        ([], 4, "each of 4 processes has 6"),
        (["batch=18"], 1, "the batch has 18"),
        ([], 5, "among 5 processes"),
        (["micro_batch=16"], 1, "16 does not divide the 24 samples"),
    ):
        with pytest.raises(UserError) as caught:
            divide(recipe(*overrides), 0, world)
        assert words in caught.value.message
    assert any("6 is no multiple" in text for text in make_plan(recipe("micro_batch=6", "teacher=digits")).refused)


def test_pools_of_critics_fit_micro_batches_or_are_refused():
    spi = ["spi_gan.critic.mbstd_group=8"]
    for name, changes, world, refused in (
        ("spi_gan_digits", [], 4, ""),  # groups of the whole batch, which the processes put together
        ("spi_gan_digits", ["micro_batch=8"], 1, "takes 32 samples in a row together"),
        ("spi_gan_digits", ["micro_batch=8", *spi], 2, ""),
        ("spi_gan_digits", ["micro_batch=4", *spi], 2, "takes 8 samples in a row together"),
        ("spi_gan_digits", ["micro_batch=8", *spi, "spi_gan.pl_weight=1"], 1, ""),
        ("dd_gan_digits", ["micro_batch=4"], 4, ""),
        ("dd_gan_digits", [], 16, ""),
        ("dd_gan_digits", ["micro_batch=2"], 1, "takes 4 samples in a row together"),
        ("sida_digits", ["sid.batch_pool=null"], 2, "each of 2 processes has"),
    ):
        recipe = load_recipe(name, changes)
        if not refused:
            assert divide(recipe, 1, world)[0][0] == recipe.batch // world
            continue
        with pytest.raises(UserError, match=refused):
            divide(recipe, 0, world)


def test_a_method_without_data_draws_the_same_whatever_the_micro_batch(recipe, tmp_path):
    found = []
    for overrides in ([], ["micro_batch=8"]):
        Pooled.seen = []
        trainer = Trainer(recipe(*overrides), Setup(recipe().options), tmp_path / str(len(found)))
        trainer.folder.mkdir()
        trainer.run(lambda done, note: None, StopFlag())
        found.append(torch.cat([labels for _, _, labels in Pooled.seen]))
        assert [entry[:2] for entry in Pooled.seen[:3]] == (
            [(0, 24)] * 3 if not overrides else [(0, 8), (8, 8), (16, 8)]
        )
    assert found[0].shape == (240,) and torch.equal(*found)


def test_a_method_without_data_needs_a_teacher(recipe):
    with pytest.raises(UserError, match="learns from a teacher alone, and the recipe has no `teacher:`"):
        prepare(recipe(), torch.device("cpu"), None, print, lambda *_: None, StopFlag())
    assert "give `teacher:`" in make_plan(recipe()).missing[0]


def test_what_a_method_needs_may_depend_on_its_options(recipe, monkeypatch):
    monkeypatch.setattr(Pooled, "needs", classmethod(lambda cls, options: "images"))
    with pytest.raises(UserError, match="method tiny-gan needs images"):
        prepare(recipe(), torch.device("cpu"), None, print, lambda *_: None, StopFlag())
    assert "images: give --data" in make_plan(recipe()).missing[0]


def test_checkpointing_is_refused_where_no_network_has_it(recipe, tmp_path):
    with pytest.raises(UserError, match="checkpointing: none of the networks of method tiny-gan"):
        Trainer(recipe("checkpointing=true"), Setup(recipe().options), tmp_path)
    assert set_checkpointing(torch.nn.Linear(1, 1), True) is False


@pytest.mark.long
def test_checkpointing_trains_the_same_weights_in_less_memory(tmp_path):
    tiny_teacher(tmp_path / "teacher.safetensors")
    (tmp_path / "r.yaml").write_text(f"""
name: r
method: ode
teacher: {tmp_path / "teacher.safetensors"}
pairs: {{path: {tmp_path / "pairs"}, n: 16, solver: euler, steps: 1, batch: 16}}
student: {{dropout: 0.1}}
optim: {{lr: 1.0e-3}}
batch: 8
images: 32
threads: 1
""")
    weights, plans = [], []
    for setting in ("checkpointing=false", "checkpointing=true"):
        recipe = load_recipe(tmp_path / "r.yaml", [setting])
        plans.append(make_plan(recipe).memory["activations (micro-batch 8)"])
        folder = tmp_path / setting
        trainer = Trainer(
            recipe, prepare(recipe, torch.device("cpu"), None, print, lambda *_: None, StopFlag()), folder
        )  # type: ignore[arg-type]
        folder.mkdir()
        trainer.run(lambda done, note: None, StopFlag())
        weights.append(torch.cat([p.detach().flatten() for p in trainer.networks["student"].parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert 0.05 * plans[0] < plans[1] < 0.6 * plans[0]
    assert set_checkpointing(tiny_network(), True)
