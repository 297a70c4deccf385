"""SPI-GAN's generator: the mapping from noise to a style along a time, then one synthesis network for all times (Choi
et al. 2022, Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.networks.config import Config
from d2o.networks.node import NODEMapping
from d2o.networks.style import StyleSynthesis


class StyleGenerator(nn.Module):
    """Noise z [B, C, R, R] and t -> image of time t: synthesis(h(t)); at t = 1 a clean one.

    `mapping`: options of `NODEMapping` beside shape and h_dim; `synthesis`: options of `StyleSynthesis` beside size,
    channels and w_dim.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        h_dim: int = 512,
        mapping: Config | None = None,
        synthesis: Config | None = None,
    ):
        super().__init__()
        mapping, synthesis = dict(mapping or {}), dict(synthesis or {})
        self.config: Config = {
            "arch": "style_generator",
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "h_dim": h_dim,
            "mapping": mapping,
            "synthesis": synthesis,
        }
        for section, own, given in (
            ("mapping", ("shape", "h_dim"), mapping),
            ("synthesis", ("img_resolution", "img_channels", "w_dim"), synthesis),
        ):
            if taken := [key for key in own if key in given]:
                raise UserError(f"network.{section}.{taken[0]} follows from the network's own size; leave it away")
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.mapping = NODEMapping((img_channels, img_resolution, img_resolution), h_dim, **mapping)
        self.synthesis = StyleSynthesis(img_resolution, img_channels, h_dim, **synthesis)

    def forward(
        self,
        ws: Tensor | None = None,
        noises: Sequence[Tensor] | None = None,
        *,
        z: Tensor | None = None,
        times: Sequence[float] = (1.0,),
        mix: tuple[Tensor, Tensor] | None = None,
        start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(images, ws, h): of noise `z` at sorted `times` [T], one after the other [T B, ...], or of given `ws` [B,
        num_ws, h_dim].

        `mix` (second noise, cutoffs [B]): an image's styles from input `cutoff` on come from it (style mixing; num_ws:
        none do). `start`: h(times[0]) instead of solving to it from z.
        """
        if ws is None:
            assert z is not None
            h = self.mapping.path(z, times) if start is None else start[None]
            ws = self.synthesis.broadcast(h.flatten(0, 1))
            if mix is not None:
                second, cutoffs = mix
                other = self.synthesis.broadcast(self.mapping.path(second, times).flatten(0, 1))
                first = torch.arange(ws.shape[1], device=ws.device) < cutoffs.repeat(len(times))[:, None]
                ws = torch.where(first[:, :, None], ws, other)
        else:
            h = ws[None, :, 0]
        return self.synthesis(ws, noises=noises), ws, h
