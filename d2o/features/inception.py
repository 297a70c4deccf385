"""The Inception network of 2015, on which FID and its kin are defined."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.features.base import OUTPUTS, Features, placed
from d2o.features.common import filled, fit
from d2o.features.resize import tf_bilinear
from d2o.interop.torch_files import read_tensors
from d2o.networks.inception import CLASSES, FEATURES, SIZE, Inception, from_tensorflow_names

NAMES = ("inception",)
HINT = (
    "expected pytorch-fid's or torch-fidelity's inception-2015-12-05 (.pth), NVIDIA's (.pt or .pkl), or that of"
    " OpenAI's consistency models (.pt); without --weights, d2o finds or fetches pytorch-fid's"
)


class InceptionFeatures(Features):
    """Images of any size, by TensorFlow's bilinear to 299 x 299. Maps as `Inception.maps`, vectors as
    `Inception.forward`."""

    network: Inception

    def __init__(self, network: Inception, sha256: str = ""):
        super().__init__(
            "inception", network, FEATURES, sha256, resize=f"tf_bilinear{SIZE}", classes=CLASSES, outputs=OUTPUTS
        )

    def from_pixels(self, pixels: Tensor) -> Tensor:
        return centred(tf_bilinear(pixels, SIZE))

    def taps(self, x: Tensor) -> list[Tensor]:
        return self.network.maps(x)

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return self.network(x, wanted)


def centred(pixels: Tensor) -> Tensor:
    """[0, 255] -> [-1, 1): (x - 128) / 128, as TensorFlow's graph has it; pytorch-fid has 2 (x / 255) - 1."""
    return (pixels - 128) / 128


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """The features with the weights in the file `weights`, else those that `find_weights` has.

    UserError: no weights to be had; a file that does not hold this network, among them torchvision's network of
    ImageNet.
    """
    network, sha256 = filled("inception", Inception, read_inception, weights, device)
    return placed(InceptionFeatures(network, sha256), device)


def read_inception(path: str | Path) -> Inception:
    """The network with the weights in any of the published files, by their names. UserError: as `load`."""
    tensors = from_tensorflow_names(read_tensors(path))
    head = tensors.get("fc.weight")
    if "AuxLogits.fc.weight" in tensors or (head is not None and head.ndim == 2 and len(head) == 1000):
        raise UserError(
            f"{path} is torchvision's inception_v3, trained on ImageNet with 1000 classes: not the network of FID,"
            " which has 1008",
            HINT,
        )
    with torch.device("meta"):
        network = Inception()
    # Batch counts play no part in evaluation, and not every file has them; what a file holds besides the network does
    # not matter.
    own = network.state_dict()
    counts = {key: torch.tensor(0) for key in own if key.endswith("num_batches_tracked")}
    return fit(
        network,
        {**{key: tensors[key] for key in own if key in tensors}, **counts},
        path,
        "the Inception network of FID",
        HINT,
    )
