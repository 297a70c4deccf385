"""The one training loop. It knows no method: a method's `step` is one iteration, everything around it is here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2o.data.latents import LatentSet
from d2o.methods.base import Batch, Draws, Method, Setup, get_method
from d2o.networks.freeze import freeze
from d2o.networks.processor import to_channels_last
from d2o.reports.curves import HIGHER_IS_BETTER
from d2o.runtime import StopFlag, Stopped
from d2o.training import distributed, saving
from d2o.training.batches import Batches, mix
from d2o.training.choices import choose
from d2o.training.divergence import BAD, Divergence, check_finite
from d2o.training.ema import EMA
from d2o.training.evaluation import Evaluation, Say
from d2o.training.logging import RunLog
from d2o.training.optim import GradientGuard, build_optimizer, clip, learning_rate, norm
from d2o.training.precision import LossScale, autocast
from d2o.training.preview import Preview
from d2o.training.products import Products
from d2o.training.scalars import Scalars, means
from d2o.training.share import checkpointed, divide
from d2o.training.tracker import tracked
from d2o.training.watch import Watch

Progress = Callable[[int, str], None]


class Trainer:
    """Runs a recipe in a run folder. Implements `d2o.methods.base.Loop` for the method.

    Everything random is a function of (seed, iteration), everything else is in `checkpoints/state.safetensors`; so a
    resumed run ends with the same bytes as one that was never interrupted.
    """

    def __init__(
        self,
        recipe: Any,
        setup: Setup,
        folder: Path,
        rank: int = 0,
        world: int = 1,
        start: Path | None = None,
        provenance: list[dict] | None = None,
        say: Say = lambda message: None,
    ):
        self.recipe, self.folder, self.rank, self.world, self.device = recipe, folder, rank, world, setup.device
        self.setup, self.start, self.provenance = setup, str(start) if start else None, provenance or []
        self.say = say
        if isinstance(recipe.threads, int):
            torch.set_num_threads(recipe.threads)
        self.local, self.micro = divide(recipe, rank, world)
        torch.manual_seed(mix(recipe.seed, "init"))
        self.method: Method = get_method(recipe.method)(setup)
        self.networks = {name: net.to(self.device).train() for name, net in self.method.players().items()}
        self.recipe = recipe = choose(recipe, self.networks[self.method.product], self.device, say)
        freeze(self.networks[self.method.product], recipe.student.freeze)
        if recipe.checkpointing:
            checkpointed(recipe, self.networks, setup.teacher)
        self.states = {name: module.to(self.device) for name, module in self.method.states().items()}
        if recipe.channels_last:
            frozen = [] if setup.teacher is None else [setup.teacher.network]
            for net in (*self.networks.values(), *self.states.values(), *frozen):
                to_channels_last(net)
        self.ema = EMA(self.networks[self.method.product], recipe.ema.half_life, recipe.ema.decay, recipe.ema.ramp)
        given = {
            name: recipe.optim if name == self.method.product else recipe.optim_critic or recipe.optim
            for name in self.networks
        }
        self.options = {name: self.method.optim(name, options) for name, options in given.items()}
        self.parameters = {
            name: [p for p in net.parameters() if p.requires_grad] for name, net in self.networks.items()
        }
        self.optimizers = {name: build_optimizer(self.parameters[name], self.options[name]) for name in self.networks}
        self.guards = {name: GradientGuard(recipe.bad_gradients, self.device) for name in self.networks}
        self.loss_scale = LossScale(recipe.precision)
        if recipe.compile:
            for net in self.networks.values():
                net.compile()
        source = {"pairs": setup.pairs, "images": setup.images, "none": None}[self.method.needs(setup.options)]
        flip = bool(recipe.data and recipe.data.xflip)
        self.batches = Batches(
            source, recipe.batch, recipe.seed, self.local, self.device, self.method.train_indices, flip
        )
        self.iterations = -(-recipe.images // recipe.batch)
        self.iteration = 0  # done so far
        self.best: dict[str, Any] | None = None
        self.scores: dict[str, float] = {}
        self.scalars = Scalars(self.device, world)  # since the last line of the log
        self.watch, self.divergence = Watch(), Divergence()
        self.norms: dict[str, list[Tensor]] = {}  # of the gradients of this iteration's updates
        self.evaluation = Evaluation(recipe, self.method, folder, self.device, rank, world, say)
        self.say = say
        self.products = Products(folder / "checkpoints")
        self.saved: int | None = None  # iteration of the newest state

    # What methods use -------------------------------------------------------------------------------------------------

    def micro_batches(self, batch: Batch, turn: int = 0) -> Iterator[tuple[Batch, Draws]]:
        start, stop = self.local
        seed = mix(self.recipe.seed, "draws", self.iteration, *([turn] if turn else []))
        for begin in range(0, stop - start, self.micro):
            yield (
                batch.part(begin, begin + self.micro),
                Draws(seed, start + begin, self.micro, self.recipe.batch, self.device),
            )

    def backward(self, loss: Tensor) -> None:
        self.loss_scale.scaled(loss * (self.micro / (self.local[1] - self.local[0]))).backward()

    def update(self, name: str) -> None:
        options, optimizer, parameters = self.options[name], self.optimizers[name], self.parameters[name]
        gradients = [p.grad for p in parameters if p.grad is not None]
        distributed.average(gradients, self.world)
        if self.loss_scale.unscale(gradients) and self.guards[name].admit(gradients, self.iteration):
            if gradients and len(self.networks) > 1:  # networks against each other: their gradients tell who wins
                self.norms.setdefault(f"grad_{name}", []).append(norm(gradients))
            clip(parameters, options)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, self.iteration, self.iterations) * self.method.rate(self.iteration)
            optimizer.step()
            torch.clear_autocast_cache()  # later calls in the same iteration are of the new weights
        optimizer.zero_grad(set_to_none=True)

    def net(self, name: str) -> nn.Module:
        return self.networks[name]

    @contextmanager
    def frozen(self, name: str) -> Iterator[nn.Module]:
        network = self.networks[name]
        for p in self.parameters[name]:
            p.requires_grad_(False)
        try:
            yield network
        finally:
            for p in self.parameters[name]:
                p.requires_grad_(True)

    def mean(self, values: list[Tensor]) -> Tensor:
        return torch.stack([v.detach().float() for v in values]).mean()

    def everywhere(self, value: Tensor) -> Tensor:
        return distributed.mean_over_processes(value.detach().clone(), self.world)

    # The run ----------------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue from the run folder's state, if it has one, see `saving`."""
        saving.resume(self)

    def run(self, progress: Progress, stop: StopFlag) -> None:
        """Train to the end. Stopped: a signal came, and the state is saved. UserError: gradients not finite under
        `bad_gradients: raise`, or a run that has diverged."""
        if self.iteration >= self.iterations:
            return
        recipe = self.recipe
        log = (
            tracked(RunLog(self.folder, self.iteration, self.images), recipe, self.folder, self.say)
            if self.rank == 0
            else None
        )
        preview = self.make_preview() if self.rank == 0 else None
        half = autocast(recipe.precision, self.device)
        clock, since = time.perf_counter(), self.iteration
        try:
            if recipe.eval:
                self.evaluation.announce()
            if preview and self.iteration == 0:
                preview.write(0, self.generate)
            while self.iteration < self.iterations:
                batch = self.batches.get(self.iteration)
                torch.manual_seed(mix(recipe.seed, "step", self.iteration, self.rank))  # dropout
                bad = self.bad_updates()
                with half:
                    scalars = self.method.step(self, batch, self.iteration)
                self.ema.update(self.networks[self.method.product], self.iteration * recipe.batch, recipe.batch)
                self.method.settle()
                norms = {key: self.mean(values) for key, values in self.norms.items()}
                self.scalars.add({**scalars, **norms, BAD: (self.bad_updates() > bad).float()})
                self.norms.clear()
                self.loss_scale.end_iteration()
                self.iteration += 1
                images, last = self.images, self.iteration == self.iterations
                stopping = distributed.any_process(bool(stop), self.device, self.world)
                regular = self.iteration % recipe.log_every == 0 or last
                if regular or stopping:
                    rows = self.scalars.rows()
                    values = self.read(rows)
                    speed = (self.iteration - since) * recipe.batch / (time.perf_counter() - clock)
                    if regular:  # nothing is logged for a signal: the log of a resumed run is that of a whole one
                        self.watch.see(self.iteration, values)
                        self.divergence.see(self.iteration, rows)
                        self.scalars.clear()
                    if log and regular:
                        verdict: dict[str, Any] = {"watch": self.watch.verdict} if self.watch.verdict else {}
                        verdict |= {"loss_scale": self.loss_scale.scale} if self.loss_scale.on else {}
                        log.write(
                            self.iteration, images, **values, **verdict, lr=self.rate(), images_per_s=round(speed, 1)
                        )
                    shown = {
                        **{key: value for key, value in values.items() if not key.startswith("grad_")},
                        **self.scores,
                    }
                    progress(
                        images,
                        "  ".join([*(f"{key} {value:.4g}" for key, value in shown.items()), self.watch.brief]).rstrip(),
                    )
                    clock, since = time.perf_counter(), self.iteration
                    self.divergence.check(self.iteration, last, recipe.bad_gradients, self.saved)
                if recipe.eval and (self.due(recipe.eval.every) or last):
                    self.evaluate(log, images)
                    clock, since = time.perf_counter(), self.iteration
                if preview and recipe.preview and (self.due(recipe.preview.every) or last):
                    preview.write(images, self.generate)
                regular = (self.due(recipe.checkpoint.every) and not self.divergence.doubtful) or last
                if regular or stopping:
                    if log:
                        log.sync()
                    saving.save(self, images, numbered=regular)  # a whole run has no number for a signal
                if stopping and not last:
                    raise Stopped(
                        f"stopped after {images:,} images, saved",
                        stop.received or 2,
                        "`--resume` with the same command continues",
                    )
        finally:
            self.batches.close()
            if log:
                log.close()

    @property
    def images(self) -> int:
        """Trained on so far; the last batch may be cut short by the recipe."""
        return min(self.iteration * self.recipe.batch, self.recipe.images)

    def rate(self) -> float:
        """The product's learning rate in the iteration that was done last."""
        done = self.iteration - 1
        return learning_rate(self.options[self.method.product], done, self.iterations) * self.method.rate(done)

    def bad_updates(self) -> Tensor:
        """How many updates had gradients that are not finite: a number that stays on the device."""
        return torch.stack([guard.count for guard in self.guards.values()]).sum()

    def due(self, every: int) -> bool:
        """True in the iteration in which the count of images passes a multiple of `every`."""
        batch = self.recipe.batch
        return self.iteration * batch // every > (self.iteration - 1) * batch // every

    def read(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """The scalars of a line of the log. Bad gradients are counted or refused here."""
        values = means(rows)
        for name, guard in self.guards.items():
            if count := guard.check(name):
                values["bad_gradients" if len(self.guards) == 1 else f"bad_gradients_{name}"] = count
        return values

    def generate(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        with torch.inference_mode():
            return self.method.generate(self.ema.network, noise, labels)

    def make_preview(self) -> Preview | None:
        recipe, spec = self.recipe, self.method.spec()
        if recipe.preview is None or spec is None:
            return None
        steps = recipe.pairs.steps if recipe.pairs else 18
        images = None if isinstance(self.setup.images, LatentSet) else self.setup.images
        return Preview(self.folder / "previews", spec, recipe.preview.n, self.setup.teacher, images, steps, self.device)

    def evaluate(self, log: RunLog | None, images: int) -> None:
        """Score the EMA product; the first process keeps it as `best` if it is, which is seen once the state is saved
        that knows of it."""
        check_finite({"the average": self.ema.network}, self.iteration, self.saved)
        scores, metric = (
            self.evaluation.scores(self.ema.network, self.generate, self.iteration),
            self.recipe.eval.metric,
        )
        if self.rank == 0:
            if log:
                log.write(self.iteration, images, eval=scores)
            self.scores = scores
            sign = -1 if metric in HIGHER_IS_BETTER else 1
            if math.isfinite(scores[metric]) and (
                self.best is None or sign * scores[metric] < sign * self.best[metric]
            ):
                self.best = {**scores, "iteration": self.iteration, "images": images}
                saving.put_product(self, "best", images)
        distributed.barrier(self.world)
