"""When a run is lost: most of its steps or its weights are not finite. It stops, and keeps what it saved before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.networks.copying import local

PATIENCE = 50
"""So many more bad iterations than good ones, from where they began, stop the run. Outliers never add up to it."""

DOUBT = 10
"""From so many on, checkpoints that are due wait until the run has recovered: what it has of better days is not
replaced."""

BAD = "bad_step"
"""Scalar of an iteration: 1 where the gradients of one of its updates were not finite."""

HINT = (
    "lower optim.lr (optim_critic.lr), lengthen optim.warmup or set optim.clip_norm, and start anew with another --out"
)


class Divergence:
    """Counts the iterations whose loss or gradients are not finite, from the scalars that the log reads anyway. `state`
    is all there is to it."""

    def __init__(self, state: Mapping[str, int] | None = None):
        self.state: dict[str, int] = {"bad": 0, "excess": 0, "since": 0, **(state or {})}

    def see(self, iteration: int, rows: Sequence[Mapping[str, float]]) -> None:
        """Take in the scalars of the iterations up to `iteration` (how many are done)."""
        state = self.state
        for at, row in enumerate(rows, start=iteration - len(rows)):
            losses = [value for key, value in row.items() if key.startswith("loss")]
            bad = row.get(BAD, 0.0) > 0 or not all(map(math.isfinite, losses))
            state["bad"] += bad
            if bad and state["excess"] == 0:
                state["since"] = at
            if state["excess"] < PATIENCE:
                state["excess"] = max(state["excess"] + (1 if bad else -1), 0)

    @property
    def doubtful(self) -> bool:
        return self.state["excess"] >= DOUBT

    def check(self, iterations: int, last: bool, policy: str, saved: int | None) -> None:
        """UserError: too many bad iterations, or, after the `last` one, more than half of all. `saved`: iteration of
        the newest state."""
        bad, since = self.state["bad"], self.state["since"]
        if self.state["excess"] >= PATIENCE:
            what = f"since iteration {since:,} most steps have had a loss or gradients that are not finite"
        elif last and 2 * bad > iterations:
            what = f"in {bad:,} of {iterations:,} iterations the loss or the gradients were not finite"
        else:
            return
        raise UserError(f"training has diverged: {what} (bad_gradients: {policy})", f"{HINT}; {kept(saved)}")


def check_weights(
    networks: Mapping[str, nn.Module],
    iteration: int,
    saved: int | None,
    agreed: Callable[[Tensor], Tensor] = lambda flags: flags,
) -> None:
    """UserError: weights that are not finite, which never go into a file. One look at the device for all networks.
    `agreed`: see `Replicate.agreed`."""
    finite = {name: flag for name, network in networks.items() if (flag := _finite(network)) is not None}
    flags = agreed(torch.stack(list(finite.values()))).tolist() if finite else []
    if not all(flags):
        names = " and ".join(name for name, good in zip(finite, flags, strict=True) if not good)
        what = f"training has diverged: after iteration {iteration:,} weights are not finite ({names})"
        raise UserError(what, f"{HINT}; {kept(saved)}")


def _finite(network: nn.Module) -> Tensor | None:
    """A boolean scalar that stays on the device; None for a network without weights."""
    here = [local(t) for t in network.state_dict().values()]
    some = [t for t in here if t.is_floating_point() and t.numel()]
    if not some:
        return None
    return torch.stack([norm.isfinite() for norm in torch._foreach_norm(some, float("inf"))]).all()


def kept(saved: int | None) -> str:
    """What there is from before, in words."""
    if not saved:
        return "nothing had been saved"
    return f"state and checkpoints are those of iteration {saved:,}, and were left as they are"
