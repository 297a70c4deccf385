"""A method's step on the meta device, which computes nothing: its network calls are counted, and what autograd keeps of
them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d2o.condition import Condition
from d2o.methods.base import Batch, Draws, Method, Reals, Setup
from d2o.recipes.meta_ops import RememberedShapes
from d2o.students.few_step import FewStepStudent

META = torch.device("meta")


def meta_batch(method: Method, setup: Setup, n: int) -> Batch:
    if method.needs(setup.options) == "none":
        return Batch()
    spec = setup.teacher.spec if setup.teacher else method.spec()
    images = None if method.needs(setup.options) == "pairs" else setup.images
    shape = images.shape if images is not None else spec.shape if spec else ()
    classes = images.classes if images is not None else spec.classes if spec else 0
    classes = classes or method.classes
    x, labels = torch.empty(n, *shape, device=META), torch.empty(n, dtype=torch.int64, device=META) if classes else None
    reals = _meta_reals(method.real_share(setup.options), setup, n)
    scale = None if setup.guidance is None else torch.empty(n, device=META)
    if setup.teacher is not None and setup.teacher.spec.condition == "text":
        return Batch(Condition.of_prompts([""] * n).guided(scale), noise=x, target=x, images=x, reals=reals)
    target = torch.empty(n, device=META) if method.triplets else x
    return Batch(Condition(n, labels).guided(scale), noise=x, target=target, images=x, reals=reals)


def _meta_reals(share: float, setup: Setup, n: int) -> Reals | None:
    """As many real rows as there are on average."""
    if not share or setup.images is None:
        return None
    count, classes = math.ceil(share * n), setup.images.classes
    labels = torch.empty(count, dtype=torch.int64, device=META) if classes else None
    text = setup.teacher is not None and setup.teacher.spec.condition == "text"
    asked = Condition.of_prompts([""] * count) if text else Condition(count, labels)
    return Reals(list(range(count)), torch.empty(count, *setup.images.shape, device=META), asked)


class _MetaDraws(Draws):
    def __init__(self, count: int):
        self.start, self.count, self.total = 0, count, count

    def randn(self, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape, device=META)

    def rand(self, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape, device=META)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape, dtype=torch.int64, device=META)

    def picks(self, high: int) -> list[int]:
        return [0] * self.count

    def shared(self, *shape: int) -> Tensor:
        return torch.full(shape, 0.5)


class CountingLoop:
    """Stands in for the trainer: counts calls of the trained networks, and the bytes that autograd keeps for the
    backward pass."""

    def __init__(self, method: Method, micro: int):
        self.networks, self.micro, self.calls, self.bytes, self.peak = method.players(), micro, 0, 0, 0
        self.seen: set[int] = set()
        self.kept: list[Tensor] = []

    def run(self, method: Method, batch: Batch) -> None:
        handles = [net.register_forward_hook(self._count) for net in self.networks.values()]
        for block in [
            block
            for net in self.networks.values()
            for part in net.modules()
            if getattr(part, "checkpointing", False)
            for blocks in part.children()
            if isinstance(blocks, nn.ModuleDict)
            for block in blocks.values()
        ]:
            handles.append(block.register_forward_pre_hook(self._keep))
        with RememberedShapes(), torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t):
            method.step(self, batch, method.heaviest())
        for handle in handles:
            handle.remove()

    def _count(self, network: nn.Module, *_: object) -> None:
        self.calls += network.nfe if isinstance(network, FewStepStudent) else 1

    def _keep(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """What checkpointing keeps of a block is what goes into it."""
        if torch.is_grad_enabled():
            for tensor in args:
                if isinstance(tensor, Tensor):
                    self._save(tensor)

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.kept.append(tensor)  # alive, so that its address is not used again
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def micro_batches(self, batch: Batch, turn: int = 0) -> Iterator[tuple[Batch, Draws]]:
        yield batch, _MetaDraws(self.micro)

    def backward(self, loss: Tensor) -> None:
        """What was kept is freed here, so that of several backward passes in a step the largest counts."""
        self.peak = max(self.peak, self.bytes)
        self.bytes = 0
        self.seen.clear()
        self.kept.clear()

    def update(self, name: str) -> None: ...

    def net(self, name: str) -> nn.Module:
        return self.networks[name]

    @contextmanager
    def frozen(self, name: str) -> Iterator[nn.Module]:
        yield self.networks[name]

    def everywhere(self, value: Tensor) -> Tensor:
        return value

    def mean(self, values: list[Tensor]) -> Tensor:
        return values[0]
