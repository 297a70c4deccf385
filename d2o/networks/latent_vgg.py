"""VGG-16 with batch norm for the latents of a diffusion model: trunk and heads of LatentLPIPS (Kang et al. 2024,
section 3.2 and appendix B.2)."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of VGG-16's five stages."""


class LatentVGG(nn.Module):
    """Five feature maps of latents. A latent has an eighth of its image's resolution, so the first three poolings are
    left out.

    The maps are what each stage hands on: of 64x64 latents 64, 64, 64, 32 and 16 pixels wide; the last two are taken
    after their pooling, as the released networks were trained. Modules are named as in the released files:
    `slice{1..5}.{index in torchvision's vgg16_bn}`.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        index = 0
        for number, (width, convolutions) in enumerate(STAGES, start=1):
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            for _ in range(convolutions):
                stage[str(index)] = nn.Conv2d(channels, width, 3, padding=1)
                stage[str(index + 1)] = nn.BatchNorm2d(width)
                stage[str(index + 2)] = nn.ReLU(inplace=True)
                channels, index = width, index + 3
            if number >= 4:
                stage[str(index)] = nn.MaxPool2d(2)
            index += 1
            self.add_module(f"slice{number}", nn.Sequential(stage))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Latents [n, channels, h, w], h and w >= 4 -> the five maps [n, C, H, W]."""
        maps = []
        for stage in self.children():
            x = stage(x)
            maps.append(x)
        return maps


class Head(nn.Module):
    """The calibrated non-negative weight of each channel. `model.1`, because dropout stands before it while it is
    trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(OrderedDict([("1", nn.Conv2d(channels, 1, 1, bias=False))]))


class TunedVGG(nn.Module):
    """The trunk and the heads of its five maps, `net` and `lin0` to `lin4`, as the released files have them."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = LatentVGG(channels)
        for k, (width, _) in enumerate(STAGES):
            self.add_module(f"lin{k}", Head(width))

    @property
    def weights(self) -> list[Tensor]:
        """[channels] of each map."""
        heads = (self.get_submodule(f"lin{k}.model.1") for k in range(len(STAGES)))
        return [cast(Tensor, head.weight).flatten() for head in heads]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.net(x)
