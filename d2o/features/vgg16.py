"""VGG-16 of ImageNet: as the feature space of the improved precision and recall (Kynkäänniemi et al. 2019), and, with
batch norm, as a backbone of projected critics."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.features.backbone import SIZE as BACKBONE_SIZE
from d2o.features.backbone import Backbone
from d2o.features.base import Features, placed
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD, filled, fit, normalise
from d2o.features.resize import tf_bilinear
from d2o.interop.torch_files import read_tensors

NAMES = ("vgg16", "vgg16_bn")
FEATURES, SIZE = 4096, 224
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions between two poolings."""
HINT = (
    "expected torchvision's vgg16-397923af.pth or NVIDIA's vgg16.pt; without --weights, d2o finds or fetches"
    " torchvision's"
)


def layers(batch_norm: bool = False) -> Iterator[nn.Module]:
    """The convolutional layers in torchvision's order."""
    channels = 3
    for width, count in STAGES:
        for _ in range(count):
            yield nn.Conv2d(channels, width, 3, padding=1)
            if batch_norm:
                yield nn.BatchNorm2d(width)
            yield nn.ReLU(inplace=True)
            channels = width
        yield nn.MaxPool2d(2)


class Vgg16(nn.Module):
    """torchvision's layout and names, up to the second fully connected layer and its ReLU. [n, 3, 224, 224] -> [n,
    4096]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers())
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, FEATURES),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The activations before each of the five poolings."""
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return found


class Vgg16Features(Features):
    """Vector: the activations of the second fully connected layer, after its ReLU. Maps: those before each pooling.
    Prepared as torch-fidelity's "vgg16" does: TensorFlow's bilinear to 224 x 224, ImageNet's mean and standard
    deviation."""

    network: Vgg16

    def __init__(self, network: Vgg16, sha256: str = ""):
        super().__init__("vgg16", network, FEATURES, sha256, resize=f"tf_bilinear{SIZE}")

    def from_pixels(self, pixels: Tensor) -> Tensor:
        return normalise(tf_bilinear(pixels, SIZE), IMAGENET_MEAN, IMAGENET_STD)

    def taps(self, x: Tensor) -> list[Tensor]:
        return self.network.maps(x)

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"features": self.network(x)}


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The features `name` of NAMES with the weights in `weights`, else those that `find_weights` has. UserError: none
    to be had, or not this network's."""
    if name == "vgg16_bn":
        return load_as_backbone(name, weights, device)
    network, sha256 = filled("vgg16-fc2", Vgg16, read_vgg, weights, device)
    return placed(Vgg16Features(network, sha256), device)


def load_as_backbone(
    name: str, weights: Path | None = None, device: str | torch.device = "cpu", size: int = BACKBONE_SIZE
) -> Backbone:
    """vgg16_bn, whose images are resized to `size` pixels. Errors as `load`."""
    convolutions, sha256 = filled("vgg16_bn", batch_normed, read_vgg_bn, weights, device)
    placed(found := vgg16_backbone(convolutions, sha256, size), device)
    return found


TAPS = (13, 23, 33, 43)
"""Layers of vgg16_bn up to the activations before its second, third, fourth and fifth pooling."""


def vgg16_backbone(convolutions: nn.Sequential, sha256: str = "", size: int = BACKBONE_SIZE) -> Backbone:
    """vgg16_bn's convolutional layers as a backbone: maps of 128, 256, 512 and 512 channels, 112 pixels and less."""
    stages = [convolutions[i:j] for i, j in zip((0, *TAPS), TAPS)]
    widths = (128, 256, 512, 512)
    return Backbone(stages, widths, IMAGENET_MEAN, IMAGENET_STD, size=size, name="vgg16_bn", sha256=sha256)


def batch_normed() -> nn.Sequential:
    return nn.Sequential(*layers(batch_norm=True))


def read_vgg_bn(path: Path) -> nn.Sequential:
    """The convolutional layers with the weights of torchvision's file. UserError: as `load`."""
    tensors = {
        name.removeprefix("features."): tensor
        for name, tensor in read_tensors(path).items()
        if name.startswith("features.")
    }
    with torch.device("meta"):
        network = batch_normed()
    # Batch counts play no part in evaluation, and older files do not have them.
    counts = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    hint = "expected torchvision's vgg16_bn-6c64b313.pth; without --weights, d2o finds or fetches it"
    return fit(network, counts | tensors, path, "VGG-16 with batch norm", hint)


def read_vgg(path: Path) -> Vgg16:
    """The network with the weights of torchvision's file or NVIDIA's. UserError: as `load`."""
    tensors = {torchvision_name(name): tensor for name, tensor in read_tensors(path).items()}
    with torch.device("meta"):
        network = Vgg16()
    # The class logits, and in NVIDIA's file the heads of its LPIPS and the constants of its input, have no part in the
    # features.
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(("features.", "classifier.")) and name not in LOGITS
    }
    return fit(network, tensors, path, "VGG-16", HINT)


LOGITS = ("classifier.6.weight", "classifier.6.bias")
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
NVIDIA = {f"layers.conv{i}": f"features.{place}" for i, place in enumerate(CONVOLUTIONS, 1)} | {
    "layers.fc1": "classifier.0",
    "layers.fc2": "classifier.3",
    "layers.fc3": "classifier.6",
}


def torchvision_name(name: str) -> str:
    """ "layers.conv3.bias" of NVIDIA's vgg16.pt -> "features.5.bias"; other names stay."""
    module, _, leaf = name.rpartition(".")
    return f"{NVIDIA[module]}.{leaf}" if module in NVIDIA else name
