"""The gradients of one replicated network, averaged over the processes while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**23
"""Elements of gradients that are exchanged at once: few enough to copy in a moment, enough to fill the line."""


class _Flight(NamedTuple):
    """A bucket on its way: the sum over the processes will be in `flat`."""

    work: dist.Work
    flat: Tensor
    parameters: list[nn.Parameter]


class Exchange:
    """Replaces each gradient by its mean over the processes, which have to bring the same ones in the same order.

    `expect(True)` before the last backward pass of an update: gradients leave in buckets as they arrive. `finish`: what
    has not left goes, and all have landed. Averaging what is averaged already changes nothing, so that an update of
    several backward passes is right too; it only exchanges some gradients again. `land` has to come before a backward
    pass that may add to gradients on their way.

    Not DistributedDataParallel: that counts on one backward pass a step with a gradient for every parameter, and
    methods with a critic have passes of a few parameters (R1), several of one network in an iteration, and updates of
    one network between two of another.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: int, overlap: bool = True):
        self.parameters, self.world = list(parameters), world
        self.expected = False
        self.waiting: list[nn.Parameter] = []  # for their bucket to be full
        self.flights: list[_Flight] = []
        self.averaged: set[nn.Parameter] = set()
        if world > 1 and overlap:
            for p in self.parameters:
                p.register_post_accumulate_grad_hook(self._arrived)

    def expect(self, expected: bool) -> None:
        self.expected = expected

    def land(self) -> None:
        """Wait for what is on its way, and put it in place."""
        for flight in self.flights:
            flight.work.wait()
            flight.flat.div_(self.world)
            gradients = [p.grad for p in flight.parameters if p.grad is not None]
            pieces = flight.flat.split([p.numel() for p in flight.parameters])
            torch._foreach_copy_(
                gradients, [piece.view(p.shape) for piece, p in zip(pieces, flight.parameters, strict=True)]
            )
            self.averaged.update(flight.parameters)
        self.flights = []

    def finish(self) -> None:
        """All gradients are means when this returns."""
        self.expected = False
        if self.world == 1:
            return
        gone = {p for flight in self.flights for p in flight.parameters}
        left = set(self.waiting)
        for p in self.parameters:
            if p.grad is not None and p not in left and p not in gone and p not in self.averaged:
                self._join(p)
        self._leave()
        self.land()
        self.averaged.clear()

    def _arrived(self, p: Tensor) -> None:
        assert isinstance(p, nn.Parameter)
        if p.grad is None:  # reached by a pass that has none for it
            return
        self.averaged.discard(p)
        if self.expected and not any(p is other for other in self.waiting):
            self._join(p)

    def _join(self, p: nn.Parameter) -> None:
        self.waiting.append(p)
        if sum(p.numel() for p in self.waiting) >= BUCKET:
            self._leave()

    def _leave(self) -> None:
        if not self.waiting:
            return
        parameters, self.waiting = self.waiting, []
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.flights.append(_Flight(work, flat, parameters))
