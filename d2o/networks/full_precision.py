"""Output layers that stay in full precision whatever runs around them.

A one-step student of an eps-predicting network multiplies its output by sigma / alpha, 14.6 for Stable Diffusion, and
with it bfloat16's rounding: some 3 % of a latent's standard deviation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from d2o.networks.edm_view import EDMView

_inside: ContextVar[bool] = ContextVar("inside", default=False)


@contextmanager
def full_precision(kind: str) -> Iterator[None]:
    """Compute the block in full precision on devices of that kind, whatever autocast says around it. The meta device
    knows no autocast: plans ask `is_full`."""
    if kind == "meta":
        token = _inside.set(True)
        try:
            yield
        finally:
            _inside.reset(token)
    else:
        with torch.autocast(kind, enabled=False):
            yield


def is_full() -> bool:
    """Whether a plan is inside of such a block."""
    return _inside.get()


class FullPrecisionConv2d(nn.Conv2d):
    """A convolution that autocast leaves in float32, with what enters it."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device.type):
            bias = None if self.bias is None else self.bias.float()
            return self._conv_forward(x.float(), self.weight.float(), bias)


def keep_head(network: nn.Module) -> None:
    """Let the output convolution of a diffusers U-Net compute in full precision; its weights and their names stay.
    Other networks, whose output is multiplied by less, stay as they are."""
    head = getattr(network.net, "conv_out", None) if isinstance(network, EDMView) else None
    if type(head) is nn.Conv2d:
        head.__class__ = FullPrecisionConv2d
