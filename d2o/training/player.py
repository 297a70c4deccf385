"""One network that is trained, with all that trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.networks.copying import local, outline, replaced
from d2o.training.eight_bit import put_together, taken_apart
from d2o.training.ema import EMA
from d2o.training.optim import GradientGuard, build_optimizer, clip, decay_groups, learning_rate, set_rate
from d2o.training.share import optimisers
from d2o.training.strategy import Replicate, check_strategy, is_share, whole

if TYPE_CHECKING:
    from d2o.methods.base import Method
    from d2o.recipes.schema import Recipe
    from d2o.training.ema_section import EmaSection
    from d2o.training.optim_section import OptimSection
    from d2o.training.precision import LossScale


class Player:
    """A network's trained parameters by name, their optimiser and its rate, the guard of their gradients, clipping, and
    (of the product) the moving average. `strategy` says how all of this lies among the processes.

    Parameters that do not ask for a gradient when the player is made are never trained. `bad_gradients`: see
    `GradientGuard`; `average`: the recipe's `ema:` section, None for no average at all.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        options: OptimSection,
        strategy: Replicate,
        bad_gradients: str = "raise",
        average: EmaSection | None = None,
    ):
        self.name, self.network, self.options, self.strategy = name, network, options, strategy
        empty = outline(network) if average is not None else None
        strategy.place(network)
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.handles = {name: strategy.handle(p) for name, p in self.parameters.items()}
        self.optimizer = build_optimizer(self.handles, options)
        self.guard = GradientGuard(bad_gradients, strategy.device)
        self.exchange = strategy.exchange(self.parameters.values())
        self.ema: EMA | None = None
        if average is not None and empty is not None:
            stored = {id(tensor) for tensor in network.state_dict(keep_vars=True).values()}
            copied = {  # what no state holds, the base of a LoRA, is its own average
                old: nn.Parameter(p.detach().clone(), requires_grad=False) if id(p) in stored else p
                for old, p in zip(empty.parameters(), network.parameters(), strict=True)
            }
            settings = (average.half_life, average.decay, average.ramp, average.start)
            self.ema = EMA(network, *settings, copied=replaced(empty, copied))

    def rate(self, iteration: int, total: int, factor: float = 1.0) -> float:
        """The learning rate of 0-based `iteration`, of `total`."""
        return learning_rate(self.options, iteration, total) * factor

    def update(self, iteration: int, rate: float, scale: LossScale, measure: bool = False) -> Tensor | None:
        """One step of the optimiser by the gradients there are, which are gone afterwards. With `measure`, their norm
        before clipping; None if there are none or the step was left out."""
        self.exchange.finish()
        gradients = self.strategy.gradients(self.parameters.values(), self.handles.values())
        norm: Tensor | None = None
        strategy = self.strategy
        if scale.unscale(gradients, strategy.finite) and self.guard.admit(gradients, iteration, strategy.finite):
            if measure and gradients:
                norm = strategy.norm(gradients)
            clip(gradients, self.options, strategy.norm)
            set_rate(self.optimizer, rate)
            self.optimizer.step()
            torch.clear_autocast_cache()  # later calls in the same iteration are of the new weights
        self.optimizer.zero_grad(set_to_none=True)
        for p in self.parameters.values():
            p.grad = None
        return norm

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The network with its parameters held fixed (gradients still flow to its inputs)."""
        for p in self.parameters.values():
            p.requires_grad_(False)
        try:
            yield self.network
        finally:
            for p in self.parameters.values():
                p.requires_grad_(True)

    def averaged(self) -> nn.Module:
        """The moving average as a network that this process can call by itself: gathered, where it is sharded. All
        processes call this."""
        assert self.ema is not None
        network = self.ema.network
        parameters = list(network.parameters())
        if not any(map(is_share, parameters)):
            return network
        return replaced(network, {p: nn.Parameter(whole(p.detach()), requires_grad=False) for p in parameters})

    # For the training state -------------------------------------------------------------------------------------------

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's tensors as `<parameter>/<key>`."""
        return {
            f"{name}/{key}": self.strategy.like(value, self.parameters[name])
            for name, handle in self.handles.items()
            for key, value in taken_apart(self.optimizer.state.get(handle, {})).items()
        }

    def load_moments(self, tensors: dict[str, Tensor]) -> None:
        """Undo `moments`. An older d2o named parameters by their position among the trained ones."""
        names = list(self.parameters)
        places = [handle for group in self.optimizer.param_groups for handle in group["params"]]
        position = {id(handle): i for i, handle in enumerate(places)}
        state: dict[int, dict[str, Tensor]] = {}
        for path, tensor in tensors.items():
            name, key = path.rsplit("/", 1)
            handle = self.handles[names[int(name)] if name.isdigit() else name]
            state.setdefault(position[id(handle)], {})[key] = local(tensor)
        whole = {place: put_together(plain, places[place]) for place, plain in state.items()}
        self.optimizer.load_state_dict({"state": whole, "param_groups": self.optimizer.state_dict()["param_groups"]})


def check_players(recipe: Recipe, method: Method, networks: Mapping[str, nn.Module], world: int) -> None:
    """UserError: what players of these networks would refuse in so many processes, before they are made."""
    check_strategy(recipe, world)
    for name, options in optimisers(recipe, method, list(networks)).items():
        decay_groups({key: p for key, p in networks[name].named_parameters() if p.requires_grad}, options)
