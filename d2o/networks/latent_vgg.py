"""VGG-16 with batch norm for the latents of a diffusion model: the trunk of LatentLPIPS (Kang et al. 2024, section 3.2
and appendix B.2)."""

from __future__ import annotations

from collections import OrderedDict

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
