"""VGG-16 of ImageNet, whose second fully connected layer is the feature space of the improved precision and recall
(Kynkäänniemi et al. 2019)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.errors import unknown
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD, fit, in_chunks, normalise, ready
from d2o.features.extractor import Extractor
from d2o.features.resize import tf_bilinear
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import find_weights

NAMES = ("vgg16-fc2",)
FEATURES, SIZE = 4096, 224
WHAT = "VGG-16"
HINT = (
    "expected torchvision's vgg16-397923af.pth or NVIDIA's vgg16.pt; without --weights, d2o finds or fetches"
    " torchvision's"
)


class Vgg16(nn.Module):
    """torchvision's layout and names, up to the second fully connected layer and its ReLU. [n, 3, 224, 224] -> [n,
    4096]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for count, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, FEATURES),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class VggFeatures(Extractor):
    """Features: the activations of the second fully connected layer, after its ReLU. Prepared as torch-fidelity's
    "vgg16" does: TensorFlow's bilinear to 224 x 224, ImageNet's mean and standard deviation."""

    def __init__(self, network: Vgg16, sha256: str, device: str | torch.device = "cpu"):
        super().__init__("vgg16-fc2", FEATURES, sha256, device, resize=f"tf_bilinear{SIZE}")
        self.network = ready(network, self.device)

    def run(self, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {name: in_chunks(self.second_layer, images, self.device) for name in wanted}

    def second_layer(self, images: Tensor) -> Tensor:
        x = tf_bilinear(images.to(self.device).to(torch.float32), SIZE)
        return self.network(normalise(x, IMAGENET_MEAN, IMAGENET_STD))


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> VggFeatures:
    """The extractor with the weights in `weights`, else those that `find_weights` has. UserError: none to be had, or
    not this network's."""
    if name not in NAMES:
        raise unknown("extractor", name, NAMES)
    path = find_weights(name, weights)
    return VggFeatures(read_vgg(path), file_sha256(path), device)


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
    return fit(network, tensors, path, WHAT, HINT)


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
