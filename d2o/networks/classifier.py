"""A small image classifier. Its penultimate features serve as the offline feature extractor `digits`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from d2o.networks.config import Config


class Classifier(nn.Module):
    """Convolutional classifier for small images. forward(x [B, C, R, R] in [-1, 1]) -> logits [B, classes].

    `features(x)` -> penultimate activations [B, feature_dim]; `maps(x)` -> the activation after each stage, coarse
    last.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        classes: int,
        width: int = 32,
        feature_dim: int = 64,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.config: Config = {
            "arch": "classifier",
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "classes": classes,
            "width": width,
            "feature_dim": feature_dim,
            "dropout": dropout,
        }
        self.dropout = dropout
        self.conv0 = nn.Conv2d(img_channels, width, 3, padding=1)
        self.norm0 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.norm2 = nn.GroupNorm(8, 2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.norm3 = nn.GroupNorm(8, 2 * width)
        self.hidden = nn.Linear(2 * width * (img_resolution // 2) ** 2, feature_dim)
        self.output = nn.Linear(feature_dim, classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        found = []
        for conv, norm in self.stages():
            x = F.silu(norm(conv(x)))
            found.append(x)
        return found

    def stages(self) -> list[tuple[nn.Conv2d, nn.GroupNorm]]:
        """Convolution and normalisation of each."""
        return [
            (self.conv0, self.norm0),
            (self.conv1, self.norm1),
            (self.conv2, self.norm2),
            (self.conv3, self.norm3),
        ]

    def features(self, x: Tensor) -> Tensor:
        return F.silu(self.hidden(F.dropout(self.maps(x)[-1].flatten(1), self.dropout, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x))
