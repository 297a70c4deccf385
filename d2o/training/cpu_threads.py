"""`threads: auto`: how many CPU threads train faster here, one or all, found by doing both for a moment."""

from __future__ import annotations

import copy
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from d2o.data.order import mix
from d2o.networks.processor import AUTO
from d2o.training.precision import autocast

if TYPE_CHECKING:
    from d2o.training.loop import Trainer

ITERATIONS, SECONDS = 6, 20.0
"""At most so many iterations at a time, and so long altogether. Each number of threads is measured twice, in turn."""


def settle_threads(trainer: Trainer) -> None:
    """Take the number of threads that the recipe names, or measure where it says `auto`; the trainer's recipe then
    holds the number.

    Beside other processes of the same run nothing is measured: they would measure each other. They share the cores.
    """
    recipe = trainer.recipe
    if recipe.threads == AUTO:
        most = torch.get_num_threads()
        if trainer.world > 1:
            threads, why = (
                max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", trainer.world))),
                "this process's share of the cores",
            )
        elif trainer.device.type != "cpu" or most == 1:
            threads, why = most, "as torch has it"
        else:
            found = measure(trainer, (1, most))
            threads = min(found, key=found.__getitem__)
            why = ", ".join(f"{n}: {recipe.batch / seconds:,.0f} images/s" for n, seconds in found.items())
        trainer.recipe = recipe = recipe.model_copy(update={"threads": threads})
        trainer.say(f"threads {threads} (auto: {why})")
    if isinstance(recipe.threads, int):  # no longer `auto`
        torch.set_num_threads(recipe.threads)


def measure(trainer: Trainer, candidates: tuple[int, ...]) -> dict[int, float]:
    """Mean seconds of a few first iterations with each number of threads (the mean: where a host takes cores away,
    threads that wait for each other are slow on average, not at their best); the trainer is as it was before."""
    before = _state(trainer)
    spent: dict[int, list[float]] = {threads: [] for threads in candidates}
    try:
        for threads in (*candidates, *candidates):
            torch.set_num_threads(threads)
            seconds: list[float] = []
            while len(seconds) < ITERATIONS and sum(seconds) < SECONDS / 4:
                seconds.append(_iteration(trainer, len(seconds)))
            spent[threads] += seconds[1:] or seconds  # the first one warms up
            _restore(trainer, before)
    finally:
        torch.set_num_threads(max(candidates))
    return {threads: statistics.mean(seconds) for threads, seconds in spent.items()}


def _iteration(trainer: Trainer, iteration: int) -> float:
    """Seconds of that iteration, done as `Trainer.run` does it."""
    trainer.iteration = iteration
    torch.manual_seed(mix(trainer.recipe.seed, "step", iteration, trainer.rank))
    batch, start = trainer.batches.get(iteration), time.perf_counter()
    with autocast(trainer.recipe.precision, trainer.device):
        trainer.method.step(trainer, batch, iteration)
    return time.perf_counter() - start


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _state(trainer: Trainer) -> dict[str, Any]:
    """All that an iteration changes: what a training state holds (see `saving.save`)."""
    modules = {**trainer.networks, **trainer.states}
    return copy.deepcopy(
        {
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "ema": trainer.ema.network.state_dict(),
            "optimizers": {name: player.optimizer.state_dict() for name, player in trainer.players.items()},
            "guards": {name: player.guard for name, player in trainer.players.items()},
            "loss_scale": trainer.loss_scale,
        }
    )


def _restore(trainer: Trainer, state: dict[str, Any]) -> None:
    state = copy.deepcopy(state)
    for name, module in {**trainer.networks, **trainer.states}.items():
        module.load_state_dict(state["modules"][name])
        module.zero_grad(set_to_none=True)
    trainer.ema.network.load_state_dict(state["ema"])
    for name, player in trainer.players.items():
        player.optimizer.load_state_dict(state["optimizers"][name])
        player.guard = state["guards"][name]
    trainer.loss_scale, trainer.iteration = state["loss_scale"], 0
    trainer.norms.clear()
    torch.clear_autocast_cache()
