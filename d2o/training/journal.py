"""What a run tells: scalars gathered between two lines of the log, the log itself, and the verdicts on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2o.inputs import JsonObject
from d2o.runtime import Say
from d2o.training.divergence import Divergence
from d2o.training.due import Due
from d2o.training.logging import RunLog
from d2o.training.scalars import ScalarRow, Scalars, means
from d2o.training.tracker import Log, tracked
from d2o.training.watch import Watch

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe

Progress = Callable[[int, str], None]


class Journal:
    """The first process has a log, all take part in the scalars, which are means over them."""

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device, rank: int, world: int, say: Say):
        self.recipe, self.folder, self.rank, self.say = recipe, folder, rank, say
        self.scalars = Scalars(device, world)  # since the last line of the log
        self.watch, self.divergence = Watch(), Divergence()
        self.log: Log | None = None
        self._begin(0)

    def open(self, iteration: int, images: int) -> None:
        """Begin, or go on after so many iterations. UserError: the recipe's tracker cannot be reached."""
        if self.rank == 0:
            self.log = tracked(RunLog(self.folder, iteration, images), self.recipe, self.folder, self.say)
        self._begin(iteration)

    def close(self) -> None:
        if self.log:
            self.log.close()

    def add(self, row: Mapping[str, Tensor]) -> None:
        """The scalars of an iteration."""
        self.scalars.add(row)

    def line(
        self,
        iteration: int,
        images: int,
        due: Due,
        counted: Callable[[], ScalarRow],
        rates: ScalarRow,
        scale: ScalarRow,
        scores: ScalarRow,
        progress: Progress,
    ) -> None:
        """Read the scalars; write a line where one is due, and tell `progress`. `counted` gives what is counted of the
        whole run (bad gradients); UserError if it says that these are too many. All processes call this."""
        rows = self.scalars.rows()
        values = means(rows) | counted()
        speed = (iteration - self._since) * self.recipe.batch / (time.perf_counter() - self._clock)
        if due.line:
            self.watch.see(iteration, values)
            self.divergence.see(iteration, rows)
            self.scalars.clear()
            verdict = {"watch": self.watch.verdict} if self.watch.verdict else {}
            self.write(iteration, images, **values, **verdict, **scale, **rates, images_per_s=round(speed, 1))
        shown = {key: value for key, value in values.items() if not key.startswith("grad_")} | scores
        text = [*(f"{key} {value:.4g}" for key, value in shown.items()), self.watch.brief]
        progress(images, "  ".join(text).rstrip())
        self._begin(iteration)

    def write(self, iteration: int, images: int, **values: object) -> None:
        if self.log:
            self.log.write(iteration, images, **values)

    def sync(self) -> None:
        """Let the lines so far reach the disk, before a state does that comes after them."""
        if self.log:
            self.log.sync()

    def pause(self, iteration: int) -> None:
        """Time that is not training's has been spent."""
        self._begin(iteration)

    def _begin(self, iteration: int) -> None:
        self._since, self._clock = iteration, time.perf_counter()

    # For the training state -------------------------------------------------------------------------------------------

    def record(self, rows: list[ScalarRow]) -> JsonObject:
        """What a resumed run goes on with; `rows`: what `scalars` has, which all processes have to read."""
        record: JsonObject = {}
        if rows:
            record["since"] = [list(row.items()) for row in rows]  # pairs: the record sorts names, the log does not
        if self.watch.started:
            record["watch"] = {"state": self.watch.state}
        if self.divergence.state["bad"]:
            record["divergence"] = self.divergence.state
        return record

    def restore(self, record: JsonObject) -> None:
        """Undo `record`."""
        self.divergence = Divergence(record.get("divergence"))
        watched = record.get("watch") or {}
        self.watch = Watch(watched.get("state"))
        self.scalars.restore(record.get("since", watched.get("since", [])))  # an older d2o kept them beside the watch
