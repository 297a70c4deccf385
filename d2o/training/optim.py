"""Optimisers, learning-rate schedules, and what happens to gradients before a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.training import eight_bit

if TYPE_CHECKING:
    from d2o.training.optim_section import OptimSection

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam, "sgd": torch.optim.SGD}


def build_optimizer(parameters: Mapping[str, nn.Parameter], options: OptimSection) -> torch.optim.Optimizer:
    """The optimiser of named parameters. Foreach or fused kernels wherever torch has them. UserError: a pattern of
    `no_decay` that fits no name."""
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    groups = decay_groups(parameters, options)
    if options.name == "sgd":
        return torch.optim.SGD(groups, momentum=options.betas[0], foreach=True, **common)
    common |= {"betas": tuple(options.betas), "eps": options.eps}
    if options.state == "8bit":
        return eight_bit.eight_bit_adam(groups, options, common)
    if options.name == "radam":
        return torch.optim.RAdam(groups, foreach=True, **common)
    fused = all(p.device.type == "cuda" for p in parameters.values())
    return OPTIMIZERS[options.name](groups, fused=fused, foreach=not fused, **common)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all groups, which some optimisers keep as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def decay_groups(parameters: Mapping[str, nn.Parameter], options: OptimSection) -> list[dict[str, object]]:
    """Those that weight decay takes; those whose names fit `options.no_decay`, which have none; then a group for each
    pattern of `options.decays`, of the names that fit it first."""
    asked = [("no_decay", pattern, 0.0) for pattern in options.no_decay]
    asked += [("decays", pattern, decay) for pattern, decay in options.decays.items()]
    left = dict(parameters)
    found: dict[tuple[str, float], list[str]] = {}
    for key, pattern, decay in asked:
        fitting = [name for name in parameters if fnmatchcase(name, pattern)]
        if not fitting:
            raise UserError(
                f"optim.{key}: {pattern!r} fits no parameter",
                f"names are like {', '.join(list(parameters)[:3])}; `*bias` fits every bias",
            )
        mine = {name for name in fitting if left.pop(name, None) is not None}
        found.setdefault((key if key == "no_decay" else pattern, decay), []).extend(mine)
    groups: list[dict[str, object]] = [{"params": list(left.values())}]
    for (_, decay), names in found.items():
        groups.append({"params": [p for name, p in parameters.items() if name in set(names)], "weight_decay": decay})
    return [group for group in groups if group["params"]] or groups[:1]


def learning_rate(options: OptimSection, iteration: int, total: int) -> float:
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


def all_finite(gradients: list[Tensor]) -> Tensor:
    """Whether all numbers are finite: a truth value that stays on the device."""
    return torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all()


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

    def admit(
        self, gradients: list[Tensor], iteration: int, finite: Callable[[list[Tensor]], Tensor] = all_finite
    ) -> bool:
        """Look at (and for "zero" mend) the gradients of one step; False: leave the step out. `finite`: as this
        module's, of processes that hold parts of the gradients for all of them together."""
        if not gradients:
            return True
        bad = ~finite(gradients)
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


def clip(gradients: list[Tensor], options: OptimSection, norm: Callable[[list[Tensor]], Tensor] = norm) -> None:
    """Clip by global norm and by value, as the recipe says, in place. `norm`: as this module's, or of the parts of all
    processes."""
    if options.clip_norm is not None and gradients:
        torch._foreach_mul_(gradients, (options.clip_norm / (norm(gradients) + 1e-6)).clamp(max=1.0))
    if options.clip_value is not None and gradients:
        torch._foreach_clamp_min_(gradients, -options.clip_value)
        torch._foreach_clamp_max_(gradients, options.clip_value)
