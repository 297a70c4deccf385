"""Methods with two networks, several updates an iteration and passes of a few parameters: two processes do what one
does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from d2o.interop.safetensors_io import load_file
from tests.helpers import tiny_teacher
from tests.training.processes import Job, main, main_of_several

pytestmark = pytest.mark.long

COMMON = """
data: {path: real:digits, limit: 40}
ema: {half_life: 30}
batch: 8
images: 32
log_every: 1
threads: 1
eval: {every: 16, extractor: digits, n: 24, reference: real:digits, batch: 8}
checkpoint: {every: 1000, keep: 0}
"""
DDGAN = """
name: dd
method: dd-gan
network: {arch: ddgan, nf: 8, channel_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [4], nz: 8, zdim: 16, n_mlp: 1}
dd_gan: {critic_width: 8, critic_temb: 16, r1_every: 2}
optim: {lr: 1.0e-4, betas: [0.5, 0.9]}
"""
SPIGAN = """
name: spi
method: spi-gan
network: {arch: style_generator, h_dim: 16, mapping: {step: 0.5}, synthesis: {base: 64, max_channels: 8}}
spi_gan:
  r1_every: 2
  pl_weight: 1.0
  pl_every: 2
  mixing_prob: 0.5
  critic: {base: 64, max_channels: 8, mbstd_group: 8, time_dim: 16, cmap_dim: 16}
  ada_kimg: 0.1
  ada_interval: 1
optim: {lr: 1.0e-3, betas: [0.0, 0.99]}
"""
SIDA = """
name: sida
method: sid
teacher: {teacher}
student: {{sigma: 2.5}}
sid: {{adversarial: true, batch_pool: 4, start_g_nimg: 8, start_adv_nimg: 8}}
# Adam would make steps of the rounding errors of gradients that are 0.
optim: {{name: sgd, lr: 1.0e-6, betas: [0.0, 0.9]}}
"""


OPTIONS = (
    "eval=null",
    "checkpointing=true",
    "student.freeze=conv",
    "optim.clip_norm=1000",
    "optim.weight_decay=0.1",
    'optim.no_decay=["*bias"]',
    "bad_gradients=skip",
)
LORA = """
name: lora
method: diffusion2gan
teacher: tiny-sd
student: {{sigma: 14.6146, begins: x_T, lora: 4}}
pairs: {{n: 8, steps: 1, shard_size: 8, prompts: {prompts}, path: {pairs}}}
diffusion2gan: {{distance: {{kind: mse}}}}
optim: {{name: sgd, lr: 1.0e-2, betas: [0.0, 0.9]}}
ema: {{half_life: 30}}
batch: 8
images: 32
log_every: 1
threads: 1
checkpoint: {{every: 1000, keep: 0}}
"""
NAMES = ("dd", "spi", "sida")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Folders of runs of one process and of two, and what the two said."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_teacher(folder / "teacher.safetensors")
    for name, text in zip(NAMES, (DDGAN, SPIGAN, SIDA.format(teacher=folder / "teacher.safetensors")), strict=True):
        (folder / f"{name}.yaml").write_text(text + COMMON)
    (folder / "prompts.txt").write_text("a photo of a seven\nthree\n")
    (folder / "lora.yaml").write_text(LORA.format(prompts=folder / "prompts.txt", pairs=folder / "pairs"))

    def job(name: str, run: str, *changes: str, stop: int = 0) -> Job:
        return {"recipe": str(folder / f"{name}.yaml"), "changes": list(changes), "run": run, "stop": stop}

    here = (
        [job(name, name) for name in NAMES]
        + [job("sida", "sida_options", *OPTIONS), job("lora", "lora")]
        + [job("dd", "../two/dd_later", "eval=null", stop=2)]
    )
    there = [
        *(job(name, name) for name in NAMES),
        job("dd", "dd_later", "strategy=shard"),  # begun by one process
        job("sida", "sida_options", "strategy=shard", *OPTIONS),
        job("spi", "spi_shard", "strategy=shard", "eval=null"),  # the critic's groups reach over both
        job("lora", "lora"),
        job("lora", "lora_shard", "strategy=shard"),
    ]
    main(folder / "one", here)
    return folder / "one", folder / "two", main_of_several(folder / "two", there, folder / "said", 2)


def product(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last.safetensors")[0]


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_with_the_weights_buffers_and_controllers_of_one(runs, name):
    one, two = (load_file(run / name / "checkpoints" / "state.safetensors")[0] for run in runs[:2])
    assert one.keys() == two.keys()
    start = [key for key in one if key.startswith(("network/", "ema/"))]
    assert len(start) > 50
    assert max((one[key].float() - two[key].float()).abs().max().item() for key in start) < 1e-5
    torch.testing.assert_close(
        [one[k] for k in one], [two[k] for k in one], rtol=1e-3, atol=1e-4
    )  # the optimisers' moments too


@pytest.mark.parametrize("name", NAMES)
def test_processes_share_the_evaluation_and_choose_the_same_best(runs, name):
    one, two = ([line["eval"] for line in log(run / name) if "eval" in line] for run in runs[:2])
    assert len(one) == 2 and one == [pytest.approx(scores, rel=1e-3) for scores in two]
    assert (runs[1] / name / "checkpoints" / "best.safetensors").exists()
    assert not (runs[1] / name / "evaluation").exists()  # the work that they shared is gone


@pytest.mark.parametrize("name, run", [("dd", "dd_later"), ("spi", "spi_shard"), ("sida", "sida_options")])
def test_sharded_runs_end_with_the_weights_of_one_process(runs, name, run):
    """One begun by one process, ended by two (R1's second backward pass, evaluation); one whose critic's groups reach
    over both; one with layers that are not trained, recomputed activations, gradients through a network that is held
    fixed."""
    one, other = product(runs[0] / (run if run == "sida_options" else name)), product(runs[1] / run)
    assert one.keys() == other.keys() and len(one) > 20
    assert max((one[key].float() - other[key].float()).abs().max().item() for key in one) < 1e-5
    assert [line["iteration"] for line in log(runs[1] / run) if "eval" not in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("run", ["lora", "lora_shard"])
def test_a_lora_on_two_processes_is_that_of_one(runs, run):
    one, two = product(runs[0] / "lora"), product(runs[1] / run)
    assert one.keys() == two.keys() and all(".lora_" in key for key in two)
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-5
    assert max(one[key].abs().max().item() for key in one if ".lora_B." in key) > 1e-3  # they have moved
    parts = runs[1] / run / "checkpoints"
    held = sum(path.stat().st_size for path in parts.rglob("*.safetensors"))
    assert held < 10 * (parts / "last.safetensors").stat().st_size  # nothing of the base is saved, nor shared


def test_what_is_on_the_disk_of_a_sharded_run(runs):
    scores, sharded = (
        [line["eval"] for line in log(run) if "eval" in line][-1] for run in (runs[0] / "dd", runs[1] / "dd_later")
    )
    assert sharded == pytest.approx(scores, rel=1e-3)
    files = sorted(path.name for path in (runs[1] / "dd_later" / "checkpoints").rglob("*.safetensors"))
    parts = [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    assert files == ["best.safetensors", "last.safetensors", *parts, "state.safetensors"]


def test_nothing_warns(runs):
    assert "Warning" not in runs[2]
