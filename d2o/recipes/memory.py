"""What a process needs of memory in training, under both strategies, from the shapes of the networks alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from d2o.training.eight_bit import bytes_of
from d2o.training.exchange import BUCKET
from d2o.training.share import optimisers
from d2o.training.strategy import blocks, divides

if TYPE_CHECKING:
    from d2o.methods.base import Method
    from d2o.recipes.schema import Recipe
    from d2o.teachers.base import Teacher
    from d2o.training.optim_section import OptimSection

MOMENTS = {"adam": 2, "adamw": 2, "radam": 2, "sgd": 1}
FP32 = 4
GATHERED = 3
"""Of the largest block: its weights, their gradients, and the weights of the next one, which are fetched meanwhile."""


def memory_of(
    recipe: Recipe, method: Method, players: Mapping[str, nn.Module], processes: int, shard: bool
) -> dict[str, int]:
    """Bytes by part, without activations."""

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return FP32 * sum(_held(p, processes) if shard else p.numel() for p in parameters)

    memory: dict[str, int] = {}
    options = optimisers(recipe, method, list(players))
    trained = {name: [p for p in net.parameters() if p.requires_grad] for name, net in players.items()}
    memory["trained weights"] = sum(size(parameters) for parameters in trained.values())
    there = set() if shard else _weights(getattr(method, "teacher", None))  # a LoRA's base is the teacher itself
    held = sum(size(p for p in net.parameters() if not p.requires_grad and p not in there) for net in players.values())
    if held:
        memory["frozen weights in them"] = held
    memory["gradients"] = memory["trained weights"]
    names = " and ".join(dict.fromkeys(f"{o.name}{' 8bit' * (o.state == '8bit')}" for o in options.values()))
    memory[f"optimiser ({names})"] = sum(
        moments(o, _held(p, processes) if shard else p.numel()) for name, o in options.items() for p in trained[name]
    )
    stored = {id(tensor) for tensor in players[method.product].state_dict(keep_vars=True).values()}
    memory["EMA"] = size(p for p in players[method.product].parameters() if id(p) in stored)  # not a LoRA's base
    for name, state in method.states().items():
        buffers = sum(b.numel() * b.element_size() for b in state.buffers())
        if (kept := size(state.parameters()) + buffers) > 2**16:
            memory[f"{name} (kept beside them)"] = kept
    if shard:
        memory["gathered blocks"] = max(GATHERED * _largest(net, processes) for net in players.values())
    elif processes > 1:
        memory["gradients on their way"] = FP32 * min(2 * BUCKET, memory["gradients"] // FP32)
    return memory


def disk_of(recipe: Recipe, method: Method, players: Mapping[str, nn.Module]) -> int:
    """Bytes of a run's checkpoints: its state, and the product's files."""

    def size(network: nn.Module) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())

    kept = sum(
        moments(options, p.numel())
        for name, options in optimisers(recipe, method, list(players)).items()
        for p in players[name].parameters()
        if p.requires_grad
    )
    product = size(players[method.product])
    state = sum(map(size, [*players.values(), *method.states().values()])) + product + kept
    return state + product * (recipe.checkpoint.keep + 1 + (1 if recipe.eval else 0))


def moments(options: OptimSection, numbers: int) -> int:
    """Bytes that an optimiser keeps of a tensor of so many numbers."""
    return MOMENTS[options.name] * (bytes_of(numbers) if options.state == "8bit" else FP32 * numbers)


def _weights(teacher: Teacher | None) -> set[nn.Parameter]:
    network = None if teacher is None else teacher.network
    return set(network.parameters()) if isinstance(network, nn.Module) else set()


def _held(p: nn.Parameter, processes: int) -> int:
    """Numbers of it that the first process has, which has no fewer than the others."""
    return p.numel() * -(-p.shape[0] // processes) // p.shape[0] if divides(p, processes) else p.numel()


def _largest(network: nn.Module, processes: int) -> int:
    """Bytes of the most that is gathered at once: a block, or what is in none."""
    inside: set[nn.Parameter] = set()
    largest = 0
    for unit in [*blocks(network), network]:  # what lies in a unit of its own comes before what it is a part of
        own = [p for p in unit.parameters() if p not in inside]
        inside.update(own)
        largest = max(largest, sum(p.numel() for p in own if divides(p, processes)))
    return FP32 * largest
