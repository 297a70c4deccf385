"""The one training loop. It knows no method: a method's `step` is one iteration, everything around it is here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.condition import Condition, Generate
from d2o.data.order import mix
from d2o.data.stored_latents import LatentSet
from d2o.data.triplets import TripletSet
from d2o.inputs import JsonObject
from d2o.methods.base import Batch, Draws, Method, Setup, get_method
from d2o.networks.freeze import freeze
from d2o.networks.processor import to_channels_last
from d2o.reports.curves import higher_is_better
from d2o.runtime import Say, StopFlag, Stopped
from d2o.training import distributed, saving
from d2o.training.batches import open_batches
from d2o.training.choices import choose
from d2o.training.divergence import BAD, check_weights
from d2o.training.due import Calendar, Due
from d2o.training.ema import EMA
from d2o.training.frozen import hold_frozen
from d2o.training.gather import gather_pools
from d2o.training.journal import Journal, Progress
from d2o.training.parts import Parts
from d2o.training.player import Player
from d2o.training.precision import LossScale, autocast
from d2o.training.preview import Preview
from d2o.training.products import Products
from d2o.training.scoring import Scoring
from d2o.training.setup import first_prompts, learned_cfg, learned_solver
from d2o.training.share import checkpointed, divide, optimisers
from d2o.training.strategy import make_strategy

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe


class Trainer:
    """Runs a recipe in a run folder. Implements `d2o.methods.base.Loop` for the method.

    Everything random is a function of (seed, iteration), everything else is in the state (`saving`); so a resumed run
    ends with the same bytes as one that was never interrupted.
    """

    def __init__(
        self,
        recipe: Recipe,
        setup: Setup,
        folder: Path,
        rank: int = 0,
        world: int = 1,
        start: Path | None = None,
        provenance: list[dict] | None = None,
        say: Say = lambda message: None,
    ):
        self.folder, self.rank, self.world, self.device, self.say = folder, rank, world, setup.device, say
        self.setup, self.start, self.provenance = setup, str(start) if start else None, provenance or []
        if isinstance(recipe.threads, int):
            torch.set_num_threads(recipe.threads)
        # fp32 is fp32, as in the papers' code; matrix products are so by torch's default
        torch.backends.cudnn.allow_tf32 = False
        self.local, self.micro = divide(recipe, rank, world)
        torch.manual_seed(mix(recipe.seed, "init"))
        self.method: Method = get_method(recipe.method)(setup)
        hold_frozen(self.method, self.device)
        networks = {name: net.to(self.device).train() for name, net in self.method.players().items()}
        self.strategy = make_strategy(recipe, self.device, world)
        self.recipe = recipe = choose(recipe, networks[self.method.product], self.device, say, self.strategy.shards)
        gather_pools(networks.values(), rank, world)
        freeze(networks[self.method.product], recipe.student.freeze)
        if recipe.checkpointing:
            checkpointed(recipe, networks, setup.teacher)
        self.states = {name: module.to(self.device) for name, module in self.method.states().items()}
        if recipe.channels_last:
            frozen = [] if setup.teacher is None else [setup.teacher.network]
            for net in (*networks.values(), *self.states.values(), *frozen):
                to_channels_last(net)
        options = optimisers(recipe, self.method, list(networks))
        self.players = {
            name: Player(
                name,
                network,
                options[name],
                self.strategy,
                recipe.bad_gradients,
                recipe.ema if name == self.method.product else None,
            )
            for name, network in networks.items()
        }
        for state in self.states.values():  # some are copies of players
            self.strategy.place(state)
        self.loss_scale = LossScale(recipe.precision)
        if recipe.compile:
            for net in networks.values():
                net.compile()
        source = {"pairs": setup.pairs, "images": setup.images, "none": None}[self.method.needs(setup.options)]
        flip = bool(recipe.data and recipe.data.xflip)
        self.batches = open_batches(
            source,
            recipe.batch,
            recipe.seed,
            self.local,
            self.device,
            self.method.train_indices,
            flip,
            setup.prompts if source is setup.images or setup.captioned else None,
            None
            if setup.images is None or not (part := self.method.real_share(setup.options))
            else (setup.images, part),
        )
        self.schedule = Calendar(recipe)
        self.iterations = self.schedule.iterations
        self.iteration = 0  # done so far
        self.best: JsonObject | None = None
        self.scores: dict[str, float] = {}
        self.norms: dict[str, list[Tensor]] = {}  # of the gradients of this iteration's updates
        self.journal = Journal(recipe, folder, self.device, rank, world, say)
        self.evaluation = Scoring(recipe, self.method, folder, self.device, rank, world, say, setup.prompts)
        self.products = Products(folder / "checkpoints")
        self.saved: int | None = None  # iteration of the newest state
        self.parts: Parts | None = None  # where its tensors are, if they are sharded

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: player.network for name, player in self.players.items()}

    @property
    def product(self) -> Player:
        return self.players[self.method.product]

    @property
    def ema(self) -> EMA:
        assert self.product.ema is not None
        return self.product.ema

    @property
    def images(self) -> int:
        """Trained on so far."""
        return self.schedule.images(self.iteration)

    # What methods use -------------------------------------------------------------------------------------------------

    def micro_batches(self, batch: Batch, turn: int = 0) -> Iterator[tuple[Batch, Draws]]:
        start, stop = self.local
        seed = mix(self.recipe.seed, "draws", self.iteration, *([turn] if turn else []))
        for begin in range(0, stop - start, self.micro):
            for player in self.players.values():  # their gradients can leave in the last backward pass
                player.exchange.expect(begin + self.micro >= stop - start)
            yield (
                batch.part(begin, begin + self.micro),
                Draws(seed, start + begin, self.micro, self.recipe.batch, self.device),
            )

    def backward(self, loss: Tensor) -> None:
        for player in self.players.values():
            player.exchange.land()
        self.loss_scale.scaled(loss * (self.micro / (self.local[1] - self.local[0]))).backward()
        self.strategy.after_backward()

    def update(self, name: str) -> None:
        player = self.players[name]
        several = len(self.players) > 1  # networks against each other: their gradients tell who wins
        rate = player.rate(self.iteration, self.iterations, self.method.rate(self.iteration))
        norm = player.update(self.iteration, rate, self.loss_scale, measure=several)
        if norm is not None:
            self.norms.setdefault(f"grad_{name}", []).append(norm)

    def net(self, name: str) -> nn.Module:
        return self.players[name].network

    def frozen(self, name: str) -> AbstractContextManager[nn.Module]:
        return self.players[name].frozen()

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
        self.journal.open(self.iteration, self.images)
        try:
            self.evaluation.announce()
            preview = self.make_preview() if self.rank == 0 else None
            if self.recipe.preview and self.iteration == 0:
                self.show(preview)
            while self.iteration < self.iterations:
                self.iterate()
                due = self.schedule.after(self.iteration, distributed.any_process(bool(stop), self.device, self.world))
                if due.line or due.stop:
                    self.tell(due, progress)
                if due.eval:
                    self.evaluate()
                if due.preview:
                    self.show(preview)
                regular = due.last or (due.checkpoint and not self.journal.divergence.doubtful)
                if regular or due.stop:
                    self.journal.sync()
                    saving.save(self, numbered=regular)  # a whole run has no number for a signal
                if due.stop and not due.last:
                    what = f"stopped after {self.images:,} images, saved"
                    raise Stopped(what, stop.received or 2, "`--resume` with the same command continues")
        finally:
            self.batches.close()
            self.journal.close()

    def iterate(self) -> None:
        """One iteration: the method's step, the product's average, the scalars."""
        recipe, bad = self.recipe, self.bad_updates()
        batch = self.batches.get(self.iteration)
        torch.manual_seed(mix(recipe.seed, "step", self.iteration, self.rank))  # dropout
        with autocast(recipe.precision, self.device, self.strategy.shards):
            scalars = self.method.step(self, batch, self.iteration)
        self.ema.update(self.product.network, self.iteration * recipe.batch, recipe.batch)
        self.method.settle()
        norms = {key: self.mean(values) for key, values in self.norms.items()}
        self.journal.add({**scalars, **norms, BAD: (self.bad_updates() > bad).float()})
        self.norms.clear()
        self.loss_scale.end_iteration()
        self.iteration += 1

    def tell(self, due: Due, progress: Progress) -> None:
        """A line of the log. UserError: gradients that are refused, a run that has diverged."""
        done, factor = self.iteration - 1, self.method.rate(self.iteration - 1)
        rates = {name: player.rate(done, self.iterations, factor) for name, player in self.players.items()}
        lr = rates.pop(self.method.product)
        others = {f"lr_{name}": rate for name, rate in rates.items() if name in self.recipe.optim_critics}
        scale = {"loss_scale": self.loss_scale.scale} if self.loss_scale.on else {}
        self.journal.line(
            self.iteration, self.images, due, self.bad_gradients, {"lr": lr, **others}, scale, self.scores, progress
        )
        self.journal.divergence.check(self.iteration, due.last, self.recipe.bad_gradients, self.saved)

    def bad_updates(self) -> Tensor:
        """How many updates had gradients that are not finite: a number that stays on the device."""
        return torch.stack([player.guard.count for player in self.players.values()]).sum()

    def bad_gradients(self) -> dict[str, float]:
        """Those counts by player, where there are any. UserError: they are refused."""
        counts = {name: player.guard.check(name) for name, player in self.players.items()}
        return {
            "bad_gradients" if len(counts) == 1 else f"bad_gradients_{name}": count
            for name, count in counts.items()
            if count
        }

    def generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """Images in [-1, 1] by the average. All processes call this."""
        return self.generator(self.product.averaged())(noise, condition)

    def generator(self, network: nn.Module) -> Generate:
        def generate(noise: Tensor, condition: Condition) -> Tensor:
            with torch.inference_mode():
                return self.method.generate(network, noise, condition)

        return generate

    def make_preview(self) -> Preview | None:
        recipe, spec = self.recipe, self.method.spec()
        if recipe.preview is None or spec is None:
            return None
        images = None if isinstance(self.setup.images, LatentSet | TripletSet) else self.setup.images
        teacher = self.setup.teacher
        solver = learned_solver(recipe, teacher)
        return Preview(
            self.folder / "previews",
            spec,
            recipe.preview.n,
            teacher,
            images,
            solver,
            self.device,
            first_prompts(self.setup, recipe.preview.n),
            self.method.scales() or learned_cfg(recipe),
        )

    def show(self, preview: Preview | None) -> None:
        """A grid, by the first process. All processes call this."""
        if self.method.spec() is not None:
            network = self.product.averaged()
            if preview is not None:
                preview.write(self.images, self.generator(network))

    def evaluate(self) -> None:
        """Score the EMA product; the first process keeps it as `best` if it is, which is seen once the state is saved
        that knows of it."""
        check_weights({"the average": self.ema.network}, self.iteration, self.saved, self.strategy.agreed)
        assert self.recipe.eval is not None
        network, metric = self.product.averaged(), self.recipe.eval.metric
        scores = self.evaluation.scores(self.recipe.eval, network, self.generator(network), self.iteration)
        if self.rank == 0:
            self.journal.write(self.iteration, self.images, eval=scores)
            self.scores = scores
        sign = -1 if higher_is_better(metric) else 1
        better = (
            self.rank == 0
            and math.isfinite(scores[metric])
            and (self.best is None or sign * scores[metric] < sign * self.best[metric])
        )
        if distributed.any_process(better, self.device, self.world):
            self.best = {**scores, "iteration": self.iteration, "images": self.images}
            saving.put_product(self, "best")
        distributed.barrier(self.world)
        self.journal.pause(self.iteration)
