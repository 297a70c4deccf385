"""The 2015 Inception network behind the ways in which the known tools feed it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from d2o.errors import UserError, unknown
from d2o.features.common import at_once, fit, ready
from d2o.features.extractor import OUTPUTS, Extractor
from d2o.features.resize import clean_pil, clean_torch, tf_bilinear, torch_bilinear
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import find_weights
from d2o.networks.inception import CLASSES, FEATURES, SIZE, Inception, from_tensorflow_names

RESIZE = {
    "inception": f"tf_bilinear{SIZE}",  # torch-fidelity; the evaluations of EDM, StyleGAN and ADM
    "inception-clean": f"clean_pil{SIZE}",  # clean-fid
    "inception-clean_torch": f"clean_torch{SIZE}",
    "inception-legacy_pytorch": f"torch_bilinear{SIZE}",  # pytorch-fid
}
NAMES = (*RESIZE, "inception-tf")
"""What `load` knows. "inception-tf" is "inception", in full."""

HINT = (
    "expected pytorch-fid's or torch-fidelity's inception-2015-12-05 (.pth), NVIDIA's (.pt or .pkl), or that of"
    " OpenAI's consistency models (.pt); without --weights, d2o finds or fetches pytorch-fid's"
)


class InceptionExtractor(Extractor):
    """`network` with the preparation of `name`, one of RESIZE. Images of any size; see `Inception.forward` for the
    outputs."""

    def __init__(self, name: str, network: Inception, sha256: str, device: str | torch.device = "cpu"):
        super().__init__(name, FEATURES, sha256, device, resize=RESIZE[name], classes=CLASSES, outputs=OUTPUTS)
        self.network = ready(network.to(torch.float32), self.device).eval().requires_grad_(False)

    def run(self, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        parts = [self.network(self.prepare(part), wanted) for part in images.split(at_once(self.device))]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in wanted}

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images [n, 3, h, w] -> what the network takes, [n, 3, 299, 299] float32 on the device.

        In [-1, 1): (x - 128) / 128, as TensorFlow's graph has it; pytorch-fid has 2 (x / 255) - 1.
        """
        if self.resize.startswith("clean_pil"):
            x = clean_pil(images, SIZE).to(self.device)
        elif self.resize.startswith("clean_torch"):
            x = clean_torch(images.to(self.device), SIZE)
        elif self.resize.startswith("tf_bilinear"):
            x = tf_bilinear(images.to(self.device).to(torch.float32), SIZE)
        else:
            return torch_bilinear(images.to(self.device).to(torch.float32).div_(255), SIZE).mul_(2).sub_(1)
        return x.sub_(128).div_(128)


def load(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> InceptionExtractor:
    """The extractor `name`, one of NAMES, with the weights in the file `weights`, else those that `find_weights` has.

    UserError: unknown name; no weights to be had; a file that does not hold this network, among them torchvision's
    network of ImageNet.
    """
    if name not in NAMES:
        raise unknown("extractor", name, NAMES)
    path = find_weights("inception", weights)
    network = read_inception(path)
    return InceptionExtractor("inception" if name == "inception-tf" else name, network, file_sha256(path), device)


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
