"""What is due after an iteration: a line of the log, a grid, a measurement, a checkpoint, the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe


@dataclass(frozen=True)
class Due:
    """`line`, `preview`, `eval` and `checkpoint`: by the recipe, or as it is the last iteration. `stop`: a signal came:
    progress is told and the state saved, but nothing is logged or numbered, so that the log and the checkpoints of a
    resumed run are those of a whole one."""

    line: bool
    preview: bool
    eval: bool
    checkpoint: bool
    last: bool
    stop: bool


class Calendar:
    """The recipe's `log_every`, and what counts in images: due in the iteration in which the count passes a
    multiple."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.iterations = recipe, -(-recipe.images // recipe.batch)

    def images(self, iterations: int) -> int:
        """Trained on in so many iterations; the last batch may be cut short by the recipe."""
        return min(iterations * self.recipe.batch, self.recipe.images)

    def after(self, iterations: int, stop: bool = False) -> Due:
        """What is due once so many iterations are done."""
        recipe, last = self.recipe, iterations == self.iterations
        return Due(
            line=iterations % recipe.log_every == 0 or last,
            preview=recipe.preview is not None and (self._passes(recipe.preview.every, iterations) or last),
            eval=recipe.eval is not None and (self._passes(recipe.eval.every, iterations) or last),
            checkpoint=self._passes(recipe.checkpoint.every, iterations) or last,
            last=last,
            stop=stop,
        )

    def _passes(self, every: int, iterations: int) -> bool:
        batch = self.recipe.batch
        return iterations * batch // every > (iterations - 1) * batch // every
