"""Trains the tiny recipes of test_processes.py, alone or by several processes, which are forked from the server of
processes: torchrun's would each import torch first. (Those of test_loop.py are torchrun's.)"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TypedDict

import torch

from d2o.interop.safetensors_io import atomic_write
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag, Stopped
from d2o.training.distributed import process_group
from d2o.training.loop import Trainer
from d2o.training.setup import prepare
from tests import workers


class Job(TypedDict):
    """A recipe's file, what is set in it, the run's folder, and the iteration after which a signal comes (0: none)."""

    recipe: str
    changes: list[str]
    run: str
    stop: int


def main(out: Path, jobs: list[Job]) -> None:
    """Train, or go on with, each of them."""
    device = torch.device("cpu")
    with process_group(device) as (rank, world):
        for job in jobs:
            recipe = load_recipe(job["recipe"], job["changes"])
            folder, stop = out / job["run"], StopFlag()
            trainer = Trainer(recipe, prepare(recipe, device, None, print, lambda *_: None, stop), folder, rank, world)  # type: ignore[arg-type]
            trainer.resume()
            if rank == 0:
                atomic_write(folder / "recipe.yaml", recipe.to_yaml())
            step = trainer.method.step

            def stopping(loop, batch, iteration, job=job, stop=stop, step=step):
                if iteration + 1 == job["stop"]:
                    stop.received = 15
                return step(loop, batch, iteration)

            trainer.method.step = stopping  # type: ignore[method-assign]
            try:
                trainer.run(lambda done, note: None, stop)
            except Stopped:
                assert trainer.iteration == job["stop"]


def main_of_several(out: Path, jobs: list[Job], log: Path, count: int) -> str:
    """`main` by `count` processes; what they wrote to stderr, which went to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = [workers.CONTEXT.Process(target=_member, args=(rank, count, port, out, jobs, log)) for rank in range(count)]
    for process in group:
        process.start()
    codes = [workers.finish(process, 600) for process in group]
    assert codes == [0] * count, log.read_text()
    return log.read_text()


def _member(rank: int, count: int, port: str, out: Path, jobs: list[Job], log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1), os.dup2(handle, 2)
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in there.items()})
    main(out, jobs)
