"""Trains the tiny recipes of test_processes.py, alone or as one of several processes: python -m
tests.training.processes OUT RECIPE..."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import d2o.critics.dd_gan as ddgan_critic
from d2o.interop.safetensors_io import atomic_write
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.training.distributed import process_group
from d2o.training.loop import Trainer
from d2o.training.setup import prepare


def main(out: Path, recipes: list[str]) -> None:
    ddgan_critic.GROUP = 1  # the spread within a group of samples is of those that a process has
    device = torch.device("cpu")
    with process_group(device) as (rank, world):
        for path in recipes:
            recipe = load_recipe(path)
            folder = out / recipe.name
            trainer = Trainer(
                recipe, prepare(recipe, device, None, print, lambda *_: None, StopFlag()), folder, rank, world
            )  # type: ignore[arg-type]
            if rank == 0:
                atomic_write(folder / "recipe.yaml", recipe.to_yaml())
            trainer.run(lambda done, note: None, StopFlag())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
