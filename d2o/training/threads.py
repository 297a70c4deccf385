"""`threads: auto`: how many CPU threads train faster here, one or all, found by doing both for a moment."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import torch

from d2o.networks.processor import AUTO
from d2o.training.batches import mix
from d2o.training.precision import autocast

if TYPE_CHECKING:
    from d2o.training.loop import Trainer

ITERATIONS, SECONDS = 3, 20.0
"""What each number of threads is measured with, at most; each is measured twice, in turn, and its fastest iteration counts."""


def settle_threads(trainer: Trainer) -> None:
    """Take the number of threads that the recipe names, or measure where it says `auto`; the trainer's recipe then holds the number.

    Beside other processes of the same run nothing is measured: they would measure each other. They share the cores.
    """
    recipe = trainer.recipe
    if recipe.threads == AUTO:
        most = torch.get_num_threads()
        if trainer.device.type != "cpu" or trainer.world > 1 or most == 1:
            threads, why = most, "as torch has it"
        else:
            found = measure(trainer, (1, most))
            threads = min(found, key=found.__getitem__)
            why = ", ".join(f"{n}: {recipe.batch / seconds:,.0f} images/s" for n, seconds in found.items())
        trainer.recipe = recipe = recipe.model_copy(update={"threads": threads})
        trainer.say(f"threads {threads} (auto: {why})")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)


def measure(trainer: Trainer, candidates: tuple[int, ...]) -> dict[int, float]:
    """Seconds of the fastest of a few first iterations with each number of threads; the trainer is as it was before."""
    before, found = _state(trainer), dict.fromkeys(candidates, float("inf"))
    try:
        for threads in (*candidates, *candidates):
            torch.set_num_threads(threads)
            begun = time.perf_counter()
            for iteration in range(ITERATIONS):
                trainer.iteration = iteration
                torch.manual_seed(mix(trainer.recipe.seed, "step", iteration, trainer.rank))
                batch, start = trainer.batches.get(iteration), time.perf_counter()
                with autocast(trainer.recipe.precision, trainer.device):
                    trainer.method.step(trainer, batch, iteration)
                now = time.perf_counter()
                found[threads] = min(found[threads], now - start)
                if now - begun > SECONDS / 4:
                    break
            _restore(trainer, before)
    finally:
        torch.set_num_threads(max(candidates))
    return found


def _state(trainer: Trainer) -> dict[str, Any]:
    """All that an iteration changes: what a training state holds (see `saving.save`)."""
    modules = {**trainer.networks, **trainer.states}
    return copy.deepcopy({
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "ema": trainer.ema.network.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in trainer.optimizers.items()},
        "guards": trainer.guards,
        "loss_scale": trainer.loss_scale,
    })  # fmt: skip


def _restore(trainer: Trainer, state: dict[str, Any]) -> None:
    state = copy.deepcopy(state)
    for name, module in {**trainer.networks, **trainer.states}.items():
        module.load_state_dict(state["modules"][name])
        module.zero_grad(set_to_none=True)
    trainer.ema.network.load_state_dict(state["ema"])
    for name, optimizer in trainer.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    trainer.guards, trainer.loss_scale, trainer.iteration = state["guards"], state["loss_scale"], 0
    trainer.norms.clear()
    torch.clear_autocast_cache()
