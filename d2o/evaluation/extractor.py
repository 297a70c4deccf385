"""What every feature extractor is: a frozen network whose activations the metrics compare."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.features.base import check_fit

Device = str | torch.device


class Extractor(ABC):
    """A frozen network with features. Always float32, without TF32, in eval mode; deterministic.

    `name` for labels and results; `dim` of the features; `sha256` of the weights file; `shape` (C, H, W) of the images
    it takes, None: any size and 1 or 3 channels (grey is repeated); `resize`: what it does to images before its
    network, as results state it; `classes` that it tells apart (0: none); `outputs`: which of OUTPUTS it has.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        sha256: str,
        device: str | torch.device = "cpu",
        *,
        shape: tuple[int, int, int] | None = None,
        resize: str = "none",
        classes: int = 0,
        outputs: Collection[str] = ("features",),
    ):
        self.name, self.dim, self.sha256, self.device = name, dim, sha256, torch.device(device)
        self.shape, self.resize, self.classes, self.has = shape, resize, classes, tuple(outputs)

    @abstractmethod
    def run(self, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """uint8 images [n, C, H, W] on the CPU or the device, of a fitting shape (C = 3 where `shape` is None) -> each
        wanted output [n, d] float32 on the device. Called in inference mode."""

    def outputs(self, images: Tensor, wanted: Collection[str] = ("features",)) -> dict[str, Tensor]:
        """uint8 images [n, C, H, W] -> {output: [n, d] float32 on the device}, in one pass of the network.

        UserError: images of a shape that it does not take, or an output that it does not have.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"features are taken of uint8 images, not {images.dtype}")
        self.check_has(wanted)
        check_images_fit(tuple(images.shape[1:]), self)
        if self.shape is None and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return self.run(images, wanted)

    def check_has(self, wanted: Collection[str]) -> None:
        """UserError for an output that it does not have."""
        if missing := [name for name in wanted if name not in self.has]:
            raise UserError(
                f"the extractor {self.name!r} has no {' or '.join(missing)}", f"it has {', '.join(self.has)}"
            )

    def features(self, images: Tensor) -> Tensor:
        """uint8 images [n, C, H, W] -> features [n, dim] float32 on the extractor's device."""
        return self.outputs(images, ("features",))["features"]

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images [n, C, H, W] -> class logits [n, classes] float32."""
        return self.outputs(images, ("logits",))["logits"]


def check_images_fit(shape: tuple[int, ...], extractor: Extractor, of: str = "the images") -> None:
    """UserError unless images of `shape` (C, H, W) fit the extractor."""
    check_fit(shape, extractor.name, extractor.shape, of)
