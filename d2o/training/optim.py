"""Optimisers, learning-rate schedules, and what happens to gradients before a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from d2o.errors import UserError

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam, "sgd": torch.optim.SGD}


def build_optimizer(parameters: list[nn.Parameter], options: Any) -> torch.optim.Optimizer:
    """`options` is a recipe's `optim` section. Foreach or fused kernels wherever torch has them."""
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.name == "sgd":
        return torch.optim.SGD(parameters, momentum=options.betas[0], foreach=True, **common)
    common |= {"betas": tuple(options.betas), "eps": options.eps}
    if options.name == "radam":
        return torch.optim.RAdam(parameters, foreach=True, **common)
    fused = all(p.device.type == "cuda" for p in parameters)
    return OPTIMIZERS[options.name](parameters, fused=fused, foreach=not fused, **common)


def learning_rate(options: Any, iteration: int, total: int) -> float:
    """The rate of 0-based `iteration`: linear warm-up over `warmup` iterations, then constant, cosine or linear decay
    to `final_lr` at `total`."""
    if iteration < options.warmup:
        return options.lr * (iteration + 1) / options.warmup
    done = (iteration - options.warmup) / max(total - options.warmup, 1)
    if options.schedule == "cosine":
        return options.final_lr + (options.lr - options.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
    if options.schedule == "linear":
        return options.lr + (options.final_lr - options.lr) * done
    return options.lr


def norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together: a scalar that stays on the device."""
    return torch.stack(torch._foreach_norm(gradients)).norm()


class GradientGuard:
    """The policy for gradients that are not finite.

    "zero": NaN becomes 0 and infinities +-1e5, the step is done. "skip": the step is left out. "raise": training stops
    with an error that names the first bad iteration. Bad steps are counted. "zero" and "raise" read the device only
    when `check` is called; "skip" has to at every step.
    """

    def __init__(self, policy: str, device: torch.device):
        self.policy = policy
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.first = torch.full((), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)

    def admit(self, gradients: list[Tensor], iteration: int) -> bool:
        """Look at (and for "zero" mend) the gradients of one step; False: leave the step out."""
        if not gradients:
            return True
        norms = torch.stack(torch._foreach_norm(gradients, float("inf")))
        bad = ~norms.isfinite().all()
        self.count += bad
        self.first = torch.where(bad, self.first.clamp(max=iteration), self.first)
        if self.policy == "zero":
            for g in gradients:
                torch.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5, out=g)
        return self.policy != "skip" or not bool(bad)

    def check(self, network: str) -> int:
        """The number of bad steps so far. UserError under "raise" when there was one."""
        count = int(self.count)
        if count and self.policy == "raise":
            raise UserError(
                f"the gradients of {network!r} are not finite (first at iteration {int(self.first)})",
                "lower optim.lr, set optim.clip_norm, or choose bad_gradients: skip or zero; the last checkpoint is"
                " from before this",
            )
        return count


def clip(parameters: list[nn.Parameter], options: Any) -> None:
    """Clip by global norm and by value, as the recipe says."""
    if options.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm, foreach=True)
    if options.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, options.clip_value, foreach=True)
