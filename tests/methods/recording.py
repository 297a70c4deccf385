"""A loop that tests of methods with several networks look into."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch

from d2o.methods.base import Draws

CPU = torch.device("cpu")


class Loop:
    """One process with micro-batches of `size` of the method's batch; keeps losses and gradients. `lr` 0: networks stay
    as they are."""

    def __init__(self, method: Any, size: int | None = None, lr: float = 0.0, total: int | None = None):
        self.total = total or method.batch
        self.turns: list[int] = []
        self.networks, self.size, self.lr = method.players(), size or self.total, lr
        self.losses: list[float] = []
        self.updated: list[str] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.modes: list[tuple[bool, ...]] = []  # of the networks, in their order, whether they were in training mode

    def micro_batches(self, batch, turn=0):
        self.turns.append(turn)
        for start in range(0, self.total, self.size):
            yield batch.part(start, start + self.size), Draws(3 + 1000 * turn, start, self.size, self.total, CPU)

    def backward(self, loss):
        self.losses.append(loss.item())
        self.modes.append(tuple(network.training for network in self.networks.values()))
        (loss * (self.size / self.total)).backward()

    def update(self, name):
        self.updated.append(name)
        others = [p.grad for other, net in self.networks.items() if other != name for p in net.parameters()]
        assert all(g is None for g in others), "the other network has gradients"
        parameters = list(self.networks[name].parameters())
        self.gradients[name] = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
        )
        with torch.no_grad():
            for p in parameters:
                if self.lr and p.grad is not None:
                    p -= self.lr * p.grad
                p.grad = None

    def net(self, name):
        return self.networks[name]

    @contextmanager
    def frozen(self, name):
        self.networks[name].requires_grad_(False)
        yield self.networks[name]
        self.networks[name].requires_grad_(True)

    def everywhere(self, value):
        return value

    def mean(self, values):
        return torch.stack(values).mean().detach()
