"""Training in half precision: what runs in it, and the loss scaling that fp16 needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from d2o.inputs import JsonObject
from d2o.networks.processor import PRECISIONS
from d2o.training.optim import all_finite

START, LOWEST, GROWTH = 2.0**16, 1.0, 2000


def autocast(precision: str, device: torch.device, sharded: bool = False) -> AbstractContextManager[object]:
    """The method's step in that precision; weights, their gradients and the optimiser's moments stay float32. Of
    sharded weights no cast ones are kept: they would outlive the gathered ones."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=not sharded)


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, "Mixed precision training", section 3.2), for fp16 alone.

    Losses are multiplied by `scale`, gradients divided by it before anything looks at them, so that small ones survive
    fp16's range. An update whose gradients are not finite is left out, and the scale halved at the iteration's end;
    after GROWTH iterations without one it is doubled.
    One scale for all players: a loss may reach several of them. Not torch.amp.GradScaler: that changes its scale
    between two players of one iteration. At the lowest scale overflow is no longer the reason, and the recipe's
    `bad_gradients` decides.
    """

    def __init__(self, precision: str):
        self.on = precision == "fp16"
        self.scale, self.clean, self.overflow = START, 0, False

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale if self.on else loss

    def unscale(self, gradients: list[Tensor], finite: Callable[[list[Tensor]], Tensor] = all_finite) -> bool:
        """Divide the gradients of one update by the scale; False: they overflowed, leave the update out. Waits for the
        device. `finite`: see `GradientGuard.admit`."""
        if not self.on or not gradients:
            return True
        torch._foreach_mul_(gradients, 1 / self.scale)  # a power of two: exact
        if bool(finite(gradients)) or self.scale <= LOWEST:
            return True
        self.overflow = True
        return False

    def end_iteration(self) -> None:
        if not self.on:
            return
        self.clean = 0 if self.overflow else self.clean + 1
        if self.overflow:
            self.scale = max(self.scale / 2, LOWEST)
        elif self.clean == GROWTH:
            self.scale, self.clean = self.scale * 2, 0
        self.overflow = False

    def record(self) -> JsonObject:
        """For the training state; nothing unless it is used."""
        return {"loss_scale": {"scale": self.scale, "clean": self.clean}} if self.on else {}

    def load(self, record: JsonObject) -> None:
        if self.on and (saved := record.get("loss_scale")):
            self.scale, self.clean = saved["scale"], saved["clean"]
