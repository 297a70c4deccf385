"""A method's step on the meta device, which computes nothing: its network calls are counted, and what autograd keeps of
them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress, product
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.condition import Condition
from d2o.methods.base import Batch, Draws, Method, Reals, Setup
from d2o.networks.full_precision import is_full
from d2o.recipes.meta_ops import RememberedShapes
from d2o.students.few_step import FewStepStudent

META = torch.device("meta")
T = TypeVar("T")
DoneThen = tuple[bool, ...]
"""Which of what a method does at intervals an iteration does."""


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


class _FusedAttention(torch.autograd.Function):
    """What the kernels of every device keep of softmax(Q K^T) V: its arguments, its result, and a number for each row;
    on the meta device torch would keep the matrix of all pairs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1]))
        return out


@contextmanager
def _fused() -> Iterator[None]:
    """Attention as `_FusedAttention`, wherever such kernels are not switched off (as for double backward passes)."""
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *more: Any, **how: Any) -> Tensor:  # noqa: ANN401
        if torch.backends.cuda.flash_sdp_enabled():
            return _FusedAttention.apply(query, key, value)
        return plain(query, key, value, *more, **how)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class Kept:
    """What autograd keeps for the backward pass: bytes, each tensor once, parameters not at all. `half`: numbers in two
    bytes each, as autocast has them, but for what is computed in full precision."""

    def __init__(self, half: bool = False, beside: Kept | None = None):
        self.bytes, self.half, self.beside = 0, half, beside
        self.seen: set[int] = set()
        self.tensors: list[Tensor] = []

    def save(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        elsewhere = self.beside is not None and place in self.beside.seen
        if not isinstance(tensor, nn.Parameter) and place not in self.seen and not elsewhere:
            self.seen.add(place)
            self.tensors.append(tensor)  # alive, so that its address is not used again
            halved = self.half and tensor.dtype == torch.float32 and not is_full()
            self.bytes += tensor.numel() * (2 if halved else tensor.element_size())
        return tensor

    def clear(self) -> None:
        self.bytes = 0
        self.seen.clear()
        self.tensors.clear()

    def watch(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.save, lambda tensor: tensor)


class CountingLoop:
    """Stands in for the trainer of one process, which has `many` micro-batches of `micro` samples: counts what goes
    through the trained networks in an iteration, and the bytes that autograd keeps for the backward pass, `peak` of the
    largest one of the step; `half` as in `Kept`."""

    def __init__(self, method: Method, micro: int, half: bool = False, many: int = 1):
        self.networks, self.micro, self.many, self.peak = method.players(), micro, many, 0
        self.begins, self.intervals = method.heaviest(), method.intervals()
        self.kinds: dict[DoneThen, int] = {}  # samples through networks in an iteration, each pass of each sample once
        self.rows, self.place = [0, 0], 0
        self.kept, self.again = Kept(half), 0

    def run(self, method: Method, batch: Batch) -> None:
        handles = [net.register_forward_hook(self._count, with_kwargs=True) for net in self.networks.values()]
        with RememberedShapes(), _fused(), self._recomputing(), self.kept.watch():
            for i in (0, *(math.lcm(*compress(self.intervals, some)) for some in self._subsets())):
                kind = tuple(i % interval == 0 for interval in self.intervals)
                if kind not in self.kinds:
                    self.kinds[kind] = self._counted(method, batch, self.begins + i)
        for handle in handles:
            handle.remove()
        self.freed()

    def passes(self, iterations: int) -> int:
        """Samples through networks in so many iterations, of which those before the heaviest are as the least."""
        before = min(self.begins, iterations)
        after = sum(self._many_of(kind, iterations - before) * passes for kind, passes in self.kinds.items())
        return before * min(self.kinds.values()) + after

    def _many_of(self, kind: DoneThen, n: int) -> int:
        """How many of n iterations do this and no more: those that do it, less those that do more, ..."""
        more = [some for some in self._subsets() if all(b or not a for a, b in zip(kind, some))]
        return sum(
            (-1) ** (sum(some) - sum(kind)) * -(-n // math.lcm(*compress(self.intervals, some))) for some in more
        )

    def _subsets(self) -> Iterator[DoneThen]:
        return product((False, True), repeat=len(self.intervals))

    def _counted(self, method: Method, batch: Batch, iteration: int) -> int:
        """The first micro-batch may do what is done once (R1 of a single sample); all others are as the second one."""
        self.rows = [0, 0]
        method.step(self, batch, iteration)
        return self.rows[0] + (self.many - 1) * self.rows[1]

    def _count(self, network: nn.Module, given: tuple[Any, ...], named: dict[str, Any], _: object) -> None:
        """A pass has as many samples as the first tensor that the network is given."""
        tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor) and value.ndim]
        rows = len(tensors[0]) if tensors else self.micro
        self.rows[self.place] += rows * (network.nfe if isinstance(network, FewStepStudent) else 1)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Activation checkpointing keeps what goes into a block. What the block computes inside is there for one block
        at a time, when it is computed again (`again`, of the largest)."""
        whole = torch.utils.checkpoint.checkpoint

        def counted(block: Callable[..., T], *args: object, **how: object) -> T:
            if not torch.is_grad_enabled():
                return block(*args)
            for value in args:
                if isinstance(value, Tensor):
                    self.kept.save(value)
            inside = Kept(self.kept.half, beside=self.kept)
            with inside.watch():
                out = block(*args)
            self.again = max(self.again, inside.bytes)
            return out

        torch.utils.checkpoint.checkpoint = counted  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.utils.checkpoint.checkpoint = whole

    def micro_batches(self, batch: Batch, turn: int = 0) -> Iterator[tuple[Batch, Draws]]:
        for place in range(min(self.many, 2)):
            self.place = place
            yield batch, _MetaDraws(self.micro)
        self.place = 0

    def backward(self, loss: Tensor) -> None:
        """What was kept is freed here, so that of several backward passes in a step the largest counts."""
        self.freed()

    def freed(self) -> None:
        self.peak = max(self.peak, self.kept.bytes + self.again)
        self.kept.clear()
        self.again = 0

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
