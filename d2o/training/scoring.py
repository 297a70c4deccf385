"""The score on the way: Fréchet distance of the EMA product by the recipe's protocol. Several processes share the
images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from d2o.condition import Generate
from d2o.data.prompts import Prompts
from d2o.errors import UserError
from d2o.evaluation.quick import Evaluator
from d2o.evaluation.workplace import Workplace
from d2o.inputs import JsonObject
from d2o.interop.discard import discard
from d2o.interop.temporary import sweep
from d2o.methods.base import Method
from d2o.runtime import Say
from d2o.training import distributed

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe
    from d2o.training.eval_section import EvalSection

OWN_IMAGES = "data"
"""Reference of an `eval:` section: the recipe's own images."""


def open_evaluator(recipe: Recipe, device: torch.device) -> Evaluator | None:
    """What the recipe's `eval:` measures with; None where it measures no distance. Networks and statistics stay in
    memory for later calls.

    UserError, as `d2o eval` words it: weights or statistics that are absent (what to fetch, where to put it), or not
    those of the protocol.
    """
    asked = None if recipe.eval is None else recipe.eval.distance
    if asked is None:
        return None
    own = recipe.data if asked.reference == OWN_IMAGES else None
    return Evaluator(asked.extractor, asked.reference, device, asked.protocol, own, asked.also)


def check_cfg_of(e: EvalSection | None, method: Method) -> None:
    """UserError: `eval.cfg` for a product that is told no guidance scale, none or one out of range for one that is."""
    told = method.scales()
    if e is None or e.distance is None:
        return
    if told is None and e.cfg is not None:
        raise UserError(f"eval.cfg: the product of method {method.name} is told no guidance scale", "leave it away")
    if told is not None and (e.cfg is None or not told[0] <= e.cfg <= told[1]):
        what = "is missing" if e.cfg is None else f"{e.cfg:g} is out of range"
        raise UserError(
            f"eval.cfg {what}: the student is told the guidance scale of its samples, {told[0]:g} to {told[1]:g}"
        )


def times(recipe: Recipe) -> int:
    """Measurements of the whole run; the last one is at its end."""
    return 0 if recipe.eval is None else -(-recipe.images // recipe.eval.every)


def cost(recipe: Recipe, e: EvalSection, nfe: int) -> str:
    """What the evaluations of a run are and take, in one line."""
    many = times(recipe)
    how = f"protocol {e.protocol}, " if e.protocol else ""
    reference = "the training images" if e.reference == OWN_IMAGES else e.reference
    others = f", {', '.join(e.also)}" if e.also else ""
    calls = "1 network call" if nfe == 1 else f"{nfe} network calls"
    return (
        f"evaluation: Fréchet distance ({how}{e.extractor}){others} of {e.samples:,} images to {reference}, every"
        f" {e.every:,} images: {e.samples * many:,} images of {calls} each, beside training on {recipe.images:,}"
    )


def same_measure(before: JsonObject | None, now: EvalSection | None) -> bool:
    """Whether numbers by the `eval:` section `before` (plain data) and by `now` compare; true where nothing is measured
    now."""
    if now is None:
        return True
    rest = {"every", "batch"}
    return before is not None and all(
        value == before.get(key) for key, value in now.model_dump().items() if key not in rest
    )


def at_scale(generate: Generate, cfg: float) -> Generate:
    """Of a product that is told the guidance scale: all samples at this one."""
    return lambda noise, condition: generate(noise, condition.guided(torch.full((len(noise),), cfg)))


class Scoring:
    """Scores of a run, measured again and again."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        folder: Path,
        device: torch.device,
        rank: int,
        world: int,
        say: Say,
        prompts: Prompts | None = None,
    ):
        self.prompts = prompts  # of a product that takes text
        self.recipe, self.method, self.work, self.device, self.rank, self.world = (
            recipe,
            method,
            folder / "evaluation",
            device,
            rank,
            world,
        )
        self.say, self.told, self.spec = say, False, method.spec()

    def check(self) -> None:
        """UserError where it cannot be measured: missing weights, images of another shape, a metric that the method
        does not give."""
        e, evaluator = self.recipe.eval, open_evaluator(self.recipe, self.device)
        check_cfg_of(e, self.method)
        if e is None:
            return
        if e.metric == "fd" and (evaluator is None or self.spec is None):
            raise UserError(
                f"eval.metric: method {self.recipe.method} makes no images, so there is no Fréchet distance"
            )
        if e.metric != "fd" and evaluator is None and type(self.method).validate is Method.validate:
            raise UserError(
                f"eval.metric: method {self.recipe.method} gives no metric of its own, and so no {e.metric}",
                "eval.metric: fd measures it",
            )
        if evaluator is not None and self.spec is not None:
            evaluator.check(self.spec, e.samples, self.prompts)
            if self.spec.condition == "text" and self.prompts is None:
                raise UserError("eval: the product takes prompts, and the recipe names none to measure it with")

    def announce(self) -> None:
        """Say what is measured and how much that is."""
        e = self.recipe.eval
        if e is None or e.distance is None or self.spec is None:
            return
        shared = f", shared by {self.world} processes" if self.world > 1 else ""
        self.say(cost(self.recipe, e, self.method.nfe()) + shared)

    def scores(self, e: EvalSection, product: nn.Module, generate: Generate, iteration: int) -> dict[str, float]:
        """Numbers about the product, by the recipe's `eval:`; all processes call this, the first one gets them.
        UserError: not the metric that the recipe asks for."""
        started = time.perf_counter()
        if e.cfg is not None:
            generate = at_scale(generate, e.cfg)
        found = self.distance(e, generate, iteration) if self.spec is not None and e.distance is not None else {}
        if self.rank != 0:
            return {}
        scores = {**self.method.validate(product), **found}
        if e.metric not in scores:
            raise UserError(
                f"eval.metric: method {self.recipe.method} gives {', '.join(scores) or 'no metric'}, not {e.metric!r}"
            )
        if not self.told:
            self.told, left = True, times(self.recipe) - (iteration * self.recipe.batch // e.every)
            seconds = time.perf_counter() - started
            if seconds >= 5 and left > 0:
                self.say(f"that evaluation took {seconds:.0f} s; {left} more: about {left * seconds / 60:.0f} minutes")
        return scores

    def distance(self, e: EvalSection, generate: Generate, iteration: int) -> dict[str, float]:
        evaluator = open_evaluator(self.recipe, self.device)
        assert evaluator is not None and self.spec is not None
        if self.rank == 0:  # what a killed run left, of several processes or one
            sweep(self.work.parent, self.work.name)
            discard(self.work)
        if self.world == 1:
            return evaluator.score(generate, self.spec, n=e.samples, seed=e.seed, batch=e.batch, prompts=self.prompts)
        distributed.barrier(self.world)
        place = Workplace(self.work)
        found = evaluator.score(
            generate,
            self.spec,
            n=e.samples,
            seed=e.seed,
            batch=e.batch,
            place=place,
            key=f"iteration {iteration}",
            prompts=self.prompts,
        )
        distributed.barrier(self.world)
        if self.rank == 0:
            discard(self.work)
        return found
