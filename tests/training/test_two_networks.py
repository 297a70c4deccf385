"""What methods with several networks and optimisers need of the loop: a small adversarial method, registered here
only."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, read_meta
from d2o.methods.base import METHODS, Batch, Loop, Method, Setup
from d2o.recipes.changes import forbidden
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.training.loop import Trainer
from d2o.training.player import check_players


class TinyGAN(Method):
    """A generator learns the mean of N(3, 1) against a linear critic; data: none."""

    data = "none"
    product = "generator"

    def __init__(self, setup: Setup):
        self.generator, self.critic = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))
        self.critic_frozen: list[bool] = []

    def players(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses = []
        for _, draw in loop.micro_batches(batch):
            real, z = 3 + draw.randn(1), draw.randn(1)
            fake = loop.net("generator")(z).detach()
            loop.backward((F.softplus(loop.net("critic")(fake)) + F.softplus(-loop.net("critic")(real))).mean())
        loop.update("critic")
        for _, draw in loop.micro_batches(batch):
            with loop.frozen("critic") as critic:
                loss = F.softplus(-critic(loop.net("generator")(draw.randn(1)))).mean()
                loop.backward(loss)
                self.critic_frozen.append(all(p.grad is None and not p.requires_grad for p in critic.parameters()))
            losses.append(loss)
        loop.update("generator")
        return {"loss": loop.mean(losses)}

    def describe(self):
        return {"kind": "generator", "network": {}}


RECIPE = """
name: gan
method: tiny-gan
optim: {lr: 0.05, betas: [0.0, 0.9]}
optim_critic: {name: radam, lr: 0.02}
ema: {decay: 0.9}
batch: 64
images: 12800
log_every: 10
checkpoint: {every: 3200, keep: 0}
threads: 1
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "tiny-gan", "tests.tiny_gan_method")
    monkeypatch.setitem(sys.modules, "tests.tiny_gan_method", SimpleNamespace(METHOD=TinyGAN))
    (tmp_path / "gan.yaml").write_text(RECIPE)
    return lambda *overrides: load_recipe(tmp_path / "gan.yaml", list(overrides))


def train(recipe, folder: Path, iterations: int | None = None) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer = Trainer(recipe, Setup(recipe.options), folder)
    trainer.resume()
    stop = StopFlag()
    if iterations is not None:
        original = trainer.method.step
        trainer.method.step = lambda loop, batch, i: (
            stop.__dict__.update(received=15) if i + 1 == iterations else None,
            original(loop, batch, i),
        )[1]
        from d2o.runtime import Stopped

        with pytest.raises(Stopped):
            trainer.run(lambda done, note: None, stop)
    else:
        trainer.run(lambda done, note: None, stop)
    return trainer


@pytest.mark.long
def test_two_optimisers_alternate_and_the_critic_is_held_in_the_generators_turn(recipe, tmp_path):
    trainer = train(recipe(), tmp_path / "run")
    assert [type(p.optimizer).__name__ for p in trainer.players.values()] == ["Adam", "RAdam"]
    assert all(trainer.method.critic_frozen) and all(p.requires_grad for p in trainer.method.critic.parameters())
    assert 2 < trainer.method.generator.bias.item() < 4
    assert trainer.ema.network.bias.item() == pytest.approx(trainer.method.generator.bias.item(), abs=0.5)


def test_the_average_moves_once_after_the_iteration_and_before_it_settles(recipe, tmp_path, monkeypatch):
    def twice(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        once(self, loop, batch, iteration)
        return once(self, loop, batch, iteration)

    once = TinyGAN.step
    monkeypatch.setattr(TinyGAN, "step", twice)
    seen: list[Tensor] = []

    def settle(self) -> None:  # as EDM2's weights are normalised
        seen.append(self.generator.bias.detach().clone())
        with torch.no_grad():
            self.generator.bias.mul_(2)

    monkeypatch.setattr(TinyGAN, "settle", settle)
    run = recipe("images=64")
    trainer = Trainer(run, Setup(run.options), tmp_path)
    before = trainer.method.generator.bias.detach().clone()
    trainer.run(lambda done, note: None, StopFlag())
    assert len(seen) == 1 and not torch.equal(seen[0], before)
    torch.testing.assert_close(trainer.ema.network.bias, 0.9 * before + 0.1 * seen[0])


@pytest.mark.long
def test_both_networks_and_optimisers_resume_to_the_same_bytes(recipe, tmp_path):
    train(recipe(), tmp_path / "whole")
    train(recipe(), tmp_path / "parts", iterations=77)
    train(recipe(), tmp_path / "parts")
    state = "checkpoints/state.safetensors"
    assert (tmp_path / "whole" / state).read_bytes() == (tmp_path / "parts" / state).read_bytes()


def test_without_an_own_section_the_critic_takes_the_generators_optimiser(recipe, tmp_path):
    trainer = Trainer(recipe("optim_critic=null"), Setup(recipe().options), tmp_path)
    assert {type(p.optimizer) for p in trainer.players.values()} == {torch.optim.Adam}


@pytest.mark.long
def test_norms_and_a_verdict_are_logged_for_networks_against_each_other(recipe, tmp_path):
    train(recipe(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_generator"] > 0 and line["grad_critic"] > 0 and "watch" not in line for line in lines)
    assert "watch" not in read_meta(
        tmp_path / "checkpoints" / "state.safetensors"
    )  # TinyGAN tells nothing of its critic's logits


class Told(TinyGAN):
    """TinyGAN with the scalars that the watch looks for; the critic's loss sinks to almost nothing, and now and then
    there is one more."""

    def step(self, loop, batch, iteration):
        loss = super().step(loop, batch, iteration)["loss"]
        logit = self.critic(torch.ones(1, 1)).mean().detach()
        more = {"r1": torch.tensor(float(iteration))} if iteration % 16 == 0 else {}
        return {
            "loss_g": loss,
            "loss_d": torch.tensor(1e-3 if iteration >= 100 else 1.0) * (1 + 0.1 * logit.sigmoid()),
            "logit_real": logit,
            **more,
        }


@pytest.mark.long
@pytest.mark.parametrize("iterations", [77, 103, 150])
def test_the_watch_of_a_resumed_run_is_that_of_a_whole_one(recipe, tmp_path, monkeypatch, iterations):
    monkeypatch.setitem(sys.modules, "tests.tiny_gan_method", SimpleNamespace(METHOD=Told))
    found = train(recipe(), tmp_path / "whole")
    train(recipe(), tmp_path / "parts", iterations=iterations)
    resumed = train(recipe(), tmp_path / "parts")
    assert (
        found.journal.watch.verdict
        == resumed.journal.watch.verdict
        == "critic saturated since iteration 110 (loss_d 0.001)"
    )
    state = "checkpoints/state.safetensors"
    assert (tmp_path / "whole" / state).read_bytes() == (tmp_path / "parts" / state).read_bytes()
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    whole, parts = ([{k: v for k, v in line.items() if k != "images_per_s"} for line in lines] for lines in logs)
    assert whole == parts and whole[1]["r1"] == 16 and "r1" not in whole[2]  # the mean over the iterations that have it
    assert [line.get("watch") for line in whole[:5]] == [None] * 4 + ["stable"]


def test_in_bf16_what_comes_after_an_update_sees_the_new_weights(recipe, tmp_path):
    """Autocast keeps the halved weights of its first call: the generator's turn would have the critic from before its
    step."""
    z, seen = torch.ones(1, 1), []

    class Watched(TinyGAN):
        def step(self, loop, batch, iteration):
            self.critic(z)
            result = super().step(loop, batch, iteration)
            seen.append((self.critic(z), copy.deepcopy(self.critic)(z)))  # the copy's weights are in no cache
            return result

    sys.modules["tests.tiny_gan_method"].METHOD = Watched
    train(recipe("precision=bf16", "images=640"), tmp_path / "run")
    assert len(seen) == 10 and all(torch.equal(mine, fresh) for mine, fresh in seen)


def test_a_run_of_the_previous_version_goes_on(recipe, tmp_path):
    """Begun by d2o before players (after 23 of 40 iterations; optimisers' tensors numbered), ended as it would have."""
    fixture = Path(__file__).parent.parent / "fixtures" / "previous_state"
    run = shutil.copytree(fixture, tmp_path / "run")
    trainer = train(load_recipe(run / "recipe.yaml"), run)
    whole, _ = load_file(fixture / "whole.safetensors")
    assert trainer.iteration == 40
    torch.testing.assert_close(load_file(run / "checkpoints" / "last.safetensors")[0], whole, rtol=1e-5, atol=1e-6)


def test_critics_have_optimisers_of_their_own(recipe, tmp_path):
    critic = "optim_critics={critic: {name: sgd, lr: 0.02, schedule: cosine}}"
    own = recipe(critic, "images=1280", "checkpoint.every=5000")
    trainer = train(own, tmp_path)
    assert [type(p.optimizer).__name__ for p in trainer.players.values()] == ["Adam", "SGD"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [0.05, 0.05] and lines[0]["lr_critic"] > lines[1]["lr_critic"] > 0
    longer = recipe(critic, "images=2560")
    assert "optim_critics.critic.schedule: cosine" in forbidden(own.resolved(), longer.resolved(), 1280)[-1]


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        (["optim_critics={critc: {lr: 1}}"], 1, "optim_critics.critc: method tiny-gan trains no network of that name"),
        (["optim.no_decay=['*norm*']"], 1, "optim.no_decay: '*norm*' fits no parameter"),
        (["strategy=shard", "compile=true"], 2, "compile: torch.compile has not been tried with strategy shard"),
        (["strategy=shard", "channels_last=true"], 2, "channels_last: strategy shard"),
        (["strategy=shard", "compile=true"], 1, ""),
    ],
)
def test_what_players_refuse(recipe, changes, world, words):
    run = recipe(*changes)
    method = TinyGAN(Setup(run.options))
    if not words:
        return check_players(run, method, method.players(), world)
    with pytest.raises(UserError) as refused:
        check_players(run, method, method.players(), world)
    assert words in str(refused.value)
