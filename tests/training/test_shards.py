"""Strategy shard against one process and against replicate: precisions, clipping, guards, averages, EDM2's weights; and
runs that are killed, or go on with other numbers of processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file, read_meta
from d2o.training.checkpoint import read_state
from tests.training import shards
from tests.training.kills import content, log
from tests.training.processes import Job, main
from tests.training.shards import Kill

pytestmark = pytest.mark.long

GAN = """
name: gan
method: tiny-uneven
optim: {lr: 0.05, betas: [0.0, 0.9], eps: 0.01}
ema: {decay: 0.9}
batch: 8
images: 32
log_every: 1
checkpoint: {every: 16, keep: 1}
threads: 1
"""
OPTIONS = (
    "optim={name: sgd, lr: 0.5, betas: [0.0, 0.9], clip_norm: 0.01, weight_decay: 0.1, no_decay: ['*bias'],"
    " decays: {'middle.*': 0.3}}",
    "optim_critic={name: sgd, lr: 0.5, betas: [0.5, 0.9], clip_value: 0.001}",
    "ema={decay: 0.5, start: 16}",
)
PROJECTED = ("method=tiny-projected", "optim={name: sgd, lr: 0.01, betas: [0.0, 0.9]}")
EDM2 = ("method=tiny-edm2", "optim={name: sgd, lr: 0.1, betas: [0.0, 0.9]}", "ema={decay: 0.5, start: 1000}")
KILLED = {
    "part": Kill(0, "write", "shard-00001", -2),
    "other_part": Kill(1, "write", "shard-00002"),
    "commit": Kill(0, "os.rename", "/state.safetensors"),
    "drop": Kill(0, "os.rmdir", "checkpoints/state-"),
}
"""Name of a run -> where in its last save it is killed, counted from the end. A part is written twice: whole, then its
head in order."""


class Runs(NamedTuple):
    """Folders of the runs of one process and of several."""

    one: Path
    several: Path

    def alone(self, run: str) -> dict[str, Tensor]:
        """The product of one process."""
        return load_file(self.one / run / "checkpoints" / "last.safetensors")[0]

    def shared(self, run: str) -> dict[str, Tensor]:
        """The product of several."""
        return load_file(self.several / run / "checkpoints" / "last.safetensors")[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("shards")
    one, several = folder / "one", folder / "several"
    (folder / "gan.yaml").write_text(GAN)

    def job(run: str, *changes: str, stop: int = 0) -> Job:
        return {"recipe": str(folder / "gan.yaml"), "changes": list(changes), "run": run, "stop": stop}

    def sharded(run: str, *changes: str, stop: int = 0) -> Job:
        return job(run, "strategy=shard", *changes, stop=stop)

    rare = "checkpoint.every=1000"
    bad = [(policy, "method=tiny-stumbles", f"bad_gradients={policy}", rare) for policy in ("skip", "zero", "raise")]
    bad.append(("explodes", "method=tiny-explodes", "bad_gradients=skip", rare))
    with pytest.MonkeyPatch.context() as patch:
        shards.register(patch)
        main(one, [job(run, *PROJECTED, *how) for run, how in (("projected", ()), ("projected_4", ("micro_batch=4",)))])
        main(one, [job("gan"), job("options", *OPTIONS, rare), job("edm2", *EDM2, rare), *(job(*made) for made in bad)])
        halves = [f"precision={half}" for half in ("bf16", "fp16")]
        changes = shards.train(
            2,
            several,
            [
                sharded("whole"),
                sharded("options", *OPTIONS, rare),
                sharded("edm2", *EDM2, rare),
                *(sharded(*made) for made in bad),
                *(make(f"{make.__name__}_{half[-4:]}", half, rare) for half in halves for make in (job, sharded)),
                job("projected", *PROJECTED),
                sharded("projected_shard", *PROJECTED),
                sharded("more", rare, stop=2),
            ],
            watched="whole",
        )
        for name, kill in KILLED.items():
            found = [path for what, path in changes[kill.rank] if what == kill.what and kill.of in path]
            shards.train(2, several, [sharded(name)], watched=name, kill=kill._replace(nth=len(found) + 1 + kill.nth))
        shutil.copytree(several / "part", several / "killed")
        shards.train(4, several, [sharded("more", rare), sharded("killed"), sharded("fewer", rare, stop=1)])
        shards.train(4, several, [job("projected_of_4", *PROJECTED)])
        shards.train(2, several, [*(sharded(name) for name in KILLED), sharded("fewer", rare, stop=3)])
        main(several, [sharded("fewer", rare)])
    return Runs(one, several)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and len(a) > 5
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


@pytest.mark.parametrize("name", KILLED)
def test_a_run_of_two_processes_that_is_killed_in_a_save_goes_on_to_the_same_bytes(runs, name):
    assert content(runs.several / name) == content(runs.several / "whole")


@pytest.mark.parametrize("run", ["whole", "more", "killed", "fewer"])
def test_two_processes_then_four_and_four_then_two_then_one_end_as_one(runs, run):
    assert apart(runs.alone("gan"), runs.shared(run)) < 1e-6
    assert [line["iteration"] for line in log(runs.several / run)] == [1, 2, 3, 4]


def test_clipping_decay_by_name_and_an_average_that_begins_later(runs):
    assert apart(runs.alone("options"), runs.shared("options")) < 1e-6
    lines = [log(folder / "options")[-1] for folder in runs]
    assert lines[0]["grad_generator"] == pytest.approx(lines[1]["grad_generator"], rel=1e-4)
    assert lines[0]["grad_generator"] > 0.02 and lines[0]["grad_critic"] > 0.01  # both are clipped


def test_edm2_normalises_its_weights_before_each_pass(runs):
    one = runs.alone("edm2")
    assert apart(one, runs.shared("edm2")) < 1e-6
    rms = one["unet.enc.4x4_block0.conv_res0.weight"].square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.ones(len(rms)), rtol=0, atol=0.02)


def states(path: Path) -> dict[str, Tensor]:
    found = load_file(path / "checkpoints" / "state.safetensors")[0]
    return {key: value for key, value in found.items() if key.startswith("network/")}


@pytest.mark.parametrize("run", ["projected_4", "projected", "projected_of_4"])
def test_a_projected_critic_is_the_same_for_any_micro_batches_and_processes(runs, run):
    """Weights, singular vectors and running statistics of pools of 4 images: in a process with a whole pool each, and
    of four processes with half a pool each; R1's second backward pass goes through them."""
    one, other = states(runs.one / "projected"), states((runs.one if run == "projected_4" else runs.several) / run)
    assert one.keys() == other.keys() and any(".running_var" in key for key in one)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_a_projected_critic_can_be_sharded(runs):
    torch.testing.assert_close(runs.shared("projected_shard"), runs.alone("projected"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_gradients_that_are_not_finite_in_one_process_are_so_in_all(runs, policy):
    assert apart(runs.alone(policy), runs.shared(policy)) < 1e-6
    assert apart(runs.shared(policy), runs.shared("whole")) > 1e-3
    for folder in runs:
        record = read_meta(folder / policy / "checkpoints" / "state.safetensors")
        assert record["bad_gradients"] == {"generator": 1, "critic": 0} and record["divergence"]["bad"] == 1


def test_all_processes_refuse_together(runs):
    for run, words in (("raise", "first at iteration 2"), ("explodes", "weights are not finite (generator")):
        said = [(runs.several / run / f"refused{rank}.txt").read_text() for rank in (0, 1)]
        assert said[0] == said[1] == (runs.one / run / "refused0.txt").read_text() and words in said[0]


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_precision_is_that_of_replicated_weights(runs, half):
    replicated, sharded = runs.shared(f"job_{half}"), runs.shared(f"sharded_{half}")
    moved = apart(runs.shared("whole"), sharded)
    assert apart(replicated, sharded) < 0.02 and moved < 0.1
    scales = [[line.get("loss_scale") for line in log(runs.several / f"{way}_{half}")] for way in ("job", "sharded")]
    assert scales[0] == scales[1] and (len(set(scales[0])) > 1) == (half == "fp16")


def test_damaged_parts_of_a_state_are_refused(runs, tmp_path):
    run = shutil.copytree(runs.several / "whole", tmp_path / "run")
    assert read_state(run) is not None
    path = sorted(run.rglob("shard-*"))[1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="part of the training state, has changed"):
        read_state(run)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        read_state(run)


def test_one_process_leaves_no_parts_of_several(runs):
    assert not list((runs.several / "fewer" / "checkpoints").glob("state-*"))
