"""Networks of diffusers as a graph can hold them with a free batch size."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def for_any_batch(network: nn.Module) -> None:
    """Let its upsampling compute without looking at the batch: diffusers makes large ones contiguous first, for old
    versions of torch, and a graph would hold for the others alone."""
    from diffusers.models.upsampling import Upsample2D

    class AnyBatch(Upsample2D):
        def forward(self, hidden_states: Tensor, output_size: int | None = None) -> Tensor:
            factor = 2.0 if output_size is None else None
            x = F.interpolate(hidden_states, size=output_size, scale_factor=factor, mode="nearest")
            return (self.conv if self.name == "conv" else self.Conv2d_0)(x) if self.use_conv else x

    for module in network.modules():
        if type(module) is Upsample2D and module.interpolate and not module.use_conv_transpose and module.norm is None:
            module.__class__ = AnyBatch
