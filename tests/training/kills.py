"""A small training that is killed in a chosen change of its folder, in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch._dynamo  # so that the server of processes has them: optimisers and logs import them
import torch.utils.tensorboard  # noqa: F401

from d2o.methods.base import METHODS, Setup
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.training.loop import Trainer
from d2o.training.run_folder import locked
from tests import workers
from tests.torture.events import Events
from tests.training.test_two_networks import TinyGAN

RECIPE = """
name: kills
method: tiny-gan
optim: {lr: 0.05, betas: [0.0, 0.9]}
ema: {decay: 0.9}
batch: 8
images: 168
log_every: 4
eval: {every: 24, metric: accuracy}
checkpoint: {every: 40, keep: 2}
threads: 1
"""


class Scored(TinyGAN):
    """With a score that is best in the middle, and scalars that a critic's watch judges."""

    def validate(self, product: Any) -> dict[str, float]:
        return {"accuracy": -abs(product.bias.item() - 0.6)}

    def step(self, loop: Any, batch: Any, iteration: int) -> Any:
        loss = super().step(loop, batch, iteration)["loss"]
        return {
            "loss_g": loss,
            "loss_d": loss,
            "logit_real": loss,
            **({"r1": loss * iteration} if iteration % 3 == 0 else {}),
        }


def recipe_of(path: Path) -> Any:
    METHODS["tiny-gan"] = "tests.tiny_gan_method"
    sys.modules["tests.tiny_gan_method"] = SimpleNamespace(METHOD=Scored)  # type: ignore[assignment]
    return load_recipe(path)


def _train(path: str, folder: str, listed: str, die_at: int) -> None:
    recipe = recipe_of(Path(path))
    with locked(Path(folder)):
        events = Events(Path(folder), die_at)
        events.install()
        trainer = Trainer(recipe, Setup(recipe.options), Path(folder))
        trainer.resume()
        trainer.run(lambda done, note: None, StopFlag())
    events.save(Path(listed))


def train(recipe: Path, folder: Path, die_at: int = 0) -> tuple[int, list[tuple[str, str]]]:
    """Train, or go on, in the folder, and kill -9 it in the `die_at`-th change of a file there (0: never). The exit
    code, and the changes of a process that lived: what and which file."""
    listed = folder.with_suffix(".events")
    process = workers.CONTEXT.Process(target=_train, args=(str(recipe), str(folder), str(listed), die_at))
    process.start()
    code = workers.finish(process, 120)
    return code, [] if code else [tuple(event) for event in json.loads(listed.read_text())]


def content(run: Path) -> dict[str, Any]:
    """All that is in a run's folder and does not depend on the clock."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if "tensorboard" not in path.parts):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            found[name] = [list(line.items()) for line in log(run)]  # in this order
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]
