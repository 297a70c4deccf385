"""What `auto` in a recipe stands for here. Chosen once: the run's recipe.yaml holds the choice, and every resume takes
that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from d2o.networks.processor import AUTO, bf16_unit, chosen_precision, explain_precision, prefers_channels_last

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe

CHOSEN = ("precision", "channels_last", "threads")
"""Keys that may say `auto`."""


def as_begun(recipe: Recipe, before: Recipe | None) -> Recipe:
    """The recipe with what the run that was begun with `before` has chosen, in place of `auto`. Both are recipes;
    `before` may be None."""
    if before is None:
        return recipe
    return recipe.model_copy(update={key: getattr(before, key) for key in CHOSEN if getattr(recipe, key) == AUTO})


def choose(
    recipe: Recipe, product: nn.Module, device: torch.device, say: Callable[[str], None], sharded: bool = False
) -> Recipe:
    """The recipe with precision and memory order for that network on that device in place of `auto`; says so.
    (`threads`: `training.cpu_threads`.)"""
    changes: dict[str, object] = {}
    if recipe.precision == AUTO:
        precision = changes["precision"] = chosen_precision(AUTO, device)
        say(explain_precision(precision, device))
    elif recipe.precision == "bf16" and bf16_unit(device) is None:
        say("precision bf16: nothing here computes in bf16, so it is imitated, slower than fp32")
    if recipe.channels_last == AUTO:
        changes["channels_last"] = not sharded and prefers_channels_last(product, device)
    return recipe.model_copy(update=changes)
