"""What becomes of samples that are not finite: they stop the training, or are left out of the losses and counted."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from d2o.errors import UserError

CHECK_EVERY = 20
"""Iterations between two looks at the count of bad samples, where looking waits for the device."""


def finite(*outputs: Tensor) -> Tensor:
    """Which samples [B] hold neither NaN nor infinities in any of these, [B, ...]."""
    return torch.stack([output.detach().isfinite().flatten(1).all(1) for output in outputs]).all(0)


def each(what: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return what[:, None, None, None]


class BadSamples:
    """The policy `nan` of a method; `keep` [B] bool are the samples that are sound."""

    def __init__(self, method: str, nan: Literal["drop", "raise"], device: torch.device):
        self.method, self.drop, self.device = method, nan == "drop", device
        self.count = torch.zeros((), device=device)  # so far, under "raise"

    def replaced(self, values: Tensor, keep: Tensor, by: float) -> Tensor:
        """values [B, ...]; of samples that are dropped the number `by`."""
        return torch.where(keep.reshape(-1, *[1] * (values.ndim - 1)), values, by) if self.drop else values

    def summed(self, values: Tensor, keep: Tensor) -> Tensor:
        """values [B, ...] -> the sum of each sample's [B]; 0 for those that are dropped."""
        return self.replaced(values.flatten(1).sum(1) if values.ndim > 1 else values, keep, 0)

    def counting(self, keep: Tensor) -> Tensor | None:
        """Who counts in means over several samples; None: all."""
        return keep if self.drop else None

    def no_gradient(self, x: Tensor, keep: Tensor) -> None:
        """What went wrong in a network must not come back to x [B, C, H, W] as a gradient either."""
        if self.drop and x.requires_grad:
            x.register_hook(lambda gradient: torch.where(each(keep), gradient, 0))

    def told(self, bad: Tensor, iteration: int) -> dict[str, Tensor]:
        """For the log, the bad ones of this iteration, a scalar. UserError under "raise": there were some. On a GPU it
        looks only every so many iterations, as reading the count waits for it; no checkpoint is written meanwhile, as
        the gradients are not finite either (bad_gradients: raise)."""
        if self.drop:
            return {"nan_samples": bad}
        self.count = self.count + bad
        if self.device.type == "cpu" or (self.device.type != "meta" and (iteration + 1) % CHECK_EVERY == 0):
            if (count := round(float(self.count))) > 0:
                raise UserError(
                    f"{count} samples were not finite up to iteration {iteration}",
                    f"lower optim.lr, or take {self.method}.nan: drop with bad_gradients: zero, which leave them out;"
                    " the last checkpoint is from before this",
                )
        return {}
