"""VGG-16 for the latents of a diffusion model: trunk and heads of LatentLPIPS (Kang et al. 2024, section 3.2 and
appendix B.2)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, cast

from torch import Tensor, nn

from d2o.errors import unknown
from d2o.networks.config import Config

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Channels, in widths, and convolutions of VGG-16's five stages."""
WIDTH = 64
"""Channels of VGG-16's first stage."""
Taps = Literal["official", "pre_pool"]


class LatentVGG(nn.Module):
    """Five feature maps of latents. A latent has an eighth of its image's resolution, so the first three poolings are
    left out.

    `batch_norm`: as the released networks have it, or without (Table A2's other row). `taps`: the maps are what each
    stage hands on, the last two after their pooling, as the released networks were trained (of 64x64 latents 64, 64,
    64, 32 and 16 pixels wide); "pre_pool": before it (64, 64, 64, 64, 32). `width`: channels of the first stage, for
    smaller networks than VGG-16. `pixels`: all five poolings, as for images. Modules are named as in the released
    files: `slice{1..5}.{index in torchvision's vgg16_bn, or vgg16}`. UserError: unknown taps.
    """

    def __init__(
        self,
        channels: int,
        batch_norm: bool = True,
        taps: str = "official",
        width: int = WIDTH,
        pixels: bool = False,
    ):
        super().__init__()
        if taps not in ("official", "pre_pool"):
            raise unknown("network.taps", taps, ("official", "pre_pool"))
        self.channels, self.taps, self.widths = channels, taps, [factor * width for factor, _ in STAGES]
        self.pixels = pixels
        index = 0
        for number, (factor, convolutions) in enumerate(STAGES, start=1):
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            for _ in range(convolutions):
                layers = [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU(inplace=True)]
                if batch_norm:
                    layers.insert(1, nn.BatchNorm2d(factor * width))
                stage |= {str(index + i): layer for i, layer in enumerate(layers)}
                channels, index = factor * width, index + len(layers)
            if pixels or number >= 4:
                stage[str(index)] = nn.MaxPool2d(2)
            index += 1
            self.add_module(f"slice{number}", nn.Sequential(stage))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Latents [n, channels, h, w], h and w >= 4 -> the five maps [n, C, H, W]."""
        maps = []
        for stage in self.children():
            for layer in cast(nn.Sequential, stage):
                before, x = x, layer(x)
            maps.append(before if self.taps == "pre_pool" and isinstance(layer, nn.MaxPool2d) else x)
        return maps


class Head(nn.Module):
    """The calibrated non-negative weight of each channel. `model.1`, because dropout stands before it while it is
    trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(OrderedDict([("1", nn.Conv2d(channels, 1, 1, bias=False))]))


class TunedVGG(nn.Module):
    """The trunk and the heads of its five maps, `net` and `lin0` to `lin4`, as the released files have them. Arguments
    and errors as `LatentVGG`'s."""

    def __init__(self, channels: int, batch_norm: bool = True, taps: str = "official", width: int = WIDTH):
        super().__init__()
        self.config: Config = {
            "arch": "latent_lpips",
            "channels": channels,
            "batch_norm": batch_norm,
            "taps": taps,
            "width": width,
        }
        self.net = LatentVGG(channels, batch_norm, taps, width)
        for k, c in enumerate(self.net.widths):
            self.add_module(f"lin{k}", Head(c))

    @property
    def weights(self) -> list[Tensor]:
        """[channels] of each map."""
        heads = (self.get_submodule(f"lin{k}.model.1") for k in range(len(STAGES)))
        return [cast(Tensor, head.weight).flatten() for head in heads]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.net(x)
