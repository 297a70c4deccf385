"""How an iteration fits the memory: the batch divided among processes and into micro-batches, activations
recomputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from d2o.errors import UserError
from d2o.methods.base import Method, get_method
from d2o.networks.build import set_checkpointing
from d2o.teachers.base import Teacher

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe
    from d2o.training.optim_section import OptimSection


def divide(recipe: Recipe, rank: int = 0, world: int = 1) -> tuple[tuple[int, int], int]:
    """(start, stop) of this process's part of the global batch, and the size of its micro-batches.

    Micro-batches are contiguous and begin at multiples of their size, so that what a loss takes together
    (`Method.micro_multiple` samples in a row) is the same on any machine; or the processes take it together
    (`Method.pools_across`), each its share at once. UserError: a batch that does not divide like
    this.
    """
    batch = recipe.batch
    if batch % world:
        raise UserError(f"batch: {batch} does not divide among {world} processes")
    size = batch // world
    micro = min(recipe.micro_batch or size, size)
    if size % micro:
        raise UserError(f"micro_batch: {micro} does not divide the {size} samples of each process")
    method = get_method(recipe.method)
    together = method.micro_multiple(recipe.options, batch)
    across = method.pools_across and micro == size and batch % together == 0  # the processes take them together
    if micro % together and not across:
        what = f"method {recipe.method} takes {together} samples in a row together"
        if recipe.micro_batch is not None and micro == recipe.micro_batch:
            raise UserError(
                f"micro_batch: {what}, and {micro} is no multiple of it", "give a multiple, or leave micro_batch away"
            )
        share = f"each of {world} processes has {size}" if world > 1 else f"the batch has {size}"
        raise UserError(f"batch: {what}, and {share}", "take fewer processes, or another batch" if world > 1 else "")
    return (rank * size, (rank + 1) * size), micro


def optimisers(recipe: Recipe, method: Method, players: Sequence[str]) -> dict[str, OptimSection]:
    """The optimiser's settings of each player: of its own name in `optim_critics`, else `optim` of the product and
    `optim_critic` of the others, as the method changes them. UserError: a name of no player."""
    for name in recipe.optim_critics:
        if name not in players:
            raise UserError(
                f"optim_critics.{name}: method {recipe.method} trains no network of that name",
                f"it trains {', '.join(players)}",
            )
    given = {name: recipe.optim if name == method.product else recipe.optim_critic or recipe.optim for name in players}
    return {name: method.optim(name, recipe.optim_critics.get(name, given[name])) for name in players}


def checkpointed(recipe: Recipe, networks: Mapping[str, nn.Module], teacher: Teacher | None = None) -> None:
    """Let those of the networks that can do it recompute their activations; the teacher too, as some methods take
    gradients through it.
    UserError: none of the networks can."""
    if not any([set_checkpointing(network, True) for network in networks.values()]):
        raise UserError(
            f"checkpointing: none of the networks of method {recipe.method} can recompute its activations",
            "leave it away",
        )
    if teacher is not None and isinstance(teacher.network, nn.Module):
        set_checkpointing(teacher.network, True)
