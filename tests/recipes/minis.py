"""What test_minis_a and test_minis_b do with every recipe and variant, in a few seconds each: with --mini it dies in
the seventh of ten iterations; the same command with --resume ends it; what it made makes images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from d2o.cli.app import main
from d2o.interop.safetensors_io import read_meta
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import section_key
from d2o.runtime import Say
from d2o.students import on_base
from d2o.teachers.base import Teacher
from d2o.teachers.registry import load_teacher
from d2o.training import setup
from d2o.training.loop import Trainer

SAMPLED = ("student", "generator")
FEW: dict[str, list[str]] = {
    "pd": ["pd.stage_images={batch}", "pd.N=2"],
}
"""What makes ten iterations of a method whole."""


class Died(BaseException):
    """Nothing of d2o catches it: nothing more is written."""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


@pytest.fixture(scope="module", autouse=True)
def teachers() -> Iterator[None]:
    """They are frozen: each is loaded once."""
    loaded: dict[str, Teacher] = {}

    def once(name: str, device: torch.device, say: Say) -> Teacher:
        if name not in loaded:
            loaded[name] = load_teacher(name, device, say=say)
        return loaded[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_teacher", once)
        patch.setattr(on_base, "load_teacher", lambda name: once(name, torch.device("cpu"), print))
        yield


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stores of pairs are made once for all recipes that want the same ones."""
    yield tmp_path_factory.mktemp("stores")


def train_die_resume_and_sample(name: str, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Returns how many images it trained on."""
    recipe = load_recipe(name, mini=True)
    assert recipe.images <= 40_000
    batch = min(recipe.batch, 2 if recipe.method == "diffusion2gan" else 4)
    changes = [f"batch={batch}", f"images={10 * batch}", "threads=1", "log_every=1", "preview=null"]
    changes += [
        f"checkpoint={{every: {4 * batch}, keep: 0}}",
        *(s.format(batch=batch) for s in FEW.get(recipe.method, [])),
    ]
    if getattr(recipe.options, "batch_pool", None):
        changes.append(f"{section_key(recipe.method)}.batch_pool={batch}")
    if recipe.micro_batch:
        changes.append("micro_batch=null")
    if recipe.eval is not None and recipe.method not in ("latent-classifier", "latent-lpips"):
        changes.append("eval=null")
    if recipe.pairs is not None:
        changes += ["pairs.n=16", "pairs.batch=16", f"pairs.steps={min(recipe.pairs.steps, 2)}"]
    monkeypatch.chdir(stores)  # in whose runs/pairs the recipes look for their pairs
    folder = tmp_path / "run"
    command = ["train", name, "--mini", "--out", folder, *(word for change in changes for word in ("--set", change))]

    iterate = Trainer.iterate

    def until_the_seventh(self: Trainer) -> None:
        if self.iteration == 6:
            raise Died
        iterate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "iterate", until_the_seventh)
        with pytest.raises(Died):
            main([str(word) for word in command])
    assert read_meta(folder / "checkpoints" / "state.safetensors")["iteration"] == 4
    assert run(*command, "--resume") == 0
    product = folder / "checkpoints" / "last.safetensors"
    assert read_meta(product)["images"] == 10 * batch
    losses = [
        line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "images_per_s" in line
    ]
    assert [line["images"] for line in losses] == [batch * (i + 1) for i in range(10)]
    assert not [line for line in losses for value in line.values() if value in ("NaN", "Infinity", "-Infinity")]
    meta = read_meta(product)
    if meta["kind"] in SAMPLED:
        asked = ["--prompts", "digits"] if meta["spec"]["condition"] == "text" else []
        if recipe.pairs is not None and isinstance(recipe.pairs.cfg, tuple):
            asked += ["--cfg", recipe.pairs.cfg[0]]
        assert run("sample", folder, "--n", 2, *asked, "--out", tmp_path / "images.zip") == 0
    return int(meta["images"])
