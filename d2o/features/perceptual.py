"""Perceptual distances between two images of equal noise: LPIPS (Zhang et al. 2018)."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from d2o.data.images import to_float
from d2o.errors import UserError
from d2o.interop import torchvision_compat
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import find_weights

Device = str | torch.device
AT_ONCE = 16  # pairs in one pass of the network, which bounds its memory


class PairDistance(ABC):
    """A frozen distance between the members of a pair. Always float32, without TF32, in eval mode; deterministic.

    `name` for results, `label` for tables; `sha256` of the weights file; `space`: what it compares, "pixel" (uint8
    images) or "latent" (latents as the diffusion model sees them).
    """

    better = "lower"

    def __init__(self, name: str, label: str, sha256: str, space: Literal["pixel", "latent"], device: Device = "cpu"):
        self.name, self.label, self.sha256, self.space, self.device = name, label, sha256, space, torch.device(device)

    @abstractmethod
    def run(self, a: Tensor, b: Tensor) -> Tensor:
        """A few pairs on the device, float32: images [n, 3, H, W] in [-1, 1], or latents [n, C, h, w] -> [n]. Called in
        inference mode."""

    def check(self, height: int, width: int) -> None:
        """UserError: images of this size are too small for the network."""
        return

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Pairs on any device: uint8 images [n, C, H, W] with C 1 (grey is repeated) or 3, or latents [n, C, h, w] ->
        [n] float32 on the device.

        UserError: the members of the pairs differ in shape, or the network does not take their shape.
        """
        if a.shape != b.shape:
            raise UserError(f"{self.label} compares pairs of one shape; these are {[*a.shape]} and {[*b.shape]}")
        if self.space == "pixel":
            if a.dtype != torch.uint8 or b.dtype != torch.uint8:
                raise TypeError(f"{self.label} is taken of uint8 images, not {a.dtype} and {b.dtype}")
            if a.shape[1] not in (1, 3):
                raise UserError(f"{self.label} takes images of 1 or 3 channels; these have {a.shape[1]}")
        self.check(*a.shape[2:])
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return torch.cat(
                [
                    self.run(self._prepare(x), self._prepare(y))
                    for x, y in zip(a.split(AT_ONCE), b.split(AT_ONCE), strict=True)
                ]
            )

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.to(self.device)
        return to_float(x.expand(-1, 3, -1, -1)) if self.space == "pixel" else x.float()


class LPIPS(PairDistance):
    """LPIPS v0.1 as the package `lpips` computes it, with its linear heads, at the images' own size."""

    SMALLEST = {"alex": 31, "vgg": 16}
    TITLES = {"alex": "AlexNet", "vgg": "VGG-16"}

    def __init__(self, trunk: Literal["alex", "vgg"], weights: Path | None = None, device: Device = "cpu"):
        """`weights`: torchvision's file of the trunk; None: it is looked for. UserError: not there, or another
        network's."""
        path = find_weights(f"lpips-{trunk}", weights)
        super().__init__(f"lpips-{trunk}", f"LPIPS ({self.TITLES[trunk]})", file_sha256(path), "pixel", device)
        self.trunk, self.network = trunk, build_lpips(trunk, path).to(self.device)

    def check(self, height: int, width: int) -> None:
        least = self.SMALLEST[self.trunk]
        if min(height, width) < least:
            hint = (
                "lpips-vgg takes 16x16 and more"
                if self.trunk == "alex"
                else "its poolings leave nothing of smaller ones"
            )
            raise UserError(
                f"{self.label} needs images of at least {least}x{least} pixels; these are {width}x{height}", hint
            )

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network(a, b).flatten()


def build_lpips(trunk: Literal["alex", "vgg"], path: Path | None) -> Any:
    """`lpips.LPIPS` with its own linear heads and the trunk from torchvision's file `path` (None: left at random, for
    what it costs); frozen. The network is never asked for anything.

    UserError: lpips or torchvision is not installed, or the file is not this trunk's.
    """
    torchvision_compat.ensure()
    try:
        import lpips
    except ImportError as error:
        raise UserError(
            f"LPIPS needs the packages lpips and torchvision ({error})", "pip install 'd2o[eval]'"
        ) from error
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # the trunk is first made at random
        warnings.simplefilter("ignore")  # torchvision: an argument that lpips gives it is deprecated
        network = lpips.LPIPS(net=trunk, version="0.1", pnet_rand=True, verbose=False)
    if path is None:
        return network.eval().requires_grad_(False)
    tensors = read_tensors(path)
    state = {}
    for name, value in network.net.state_dict().items():  # slice2.3.weight is torchvision's features.3.weight
        found = tensors.get(f"features.{name.partition('.')[2]}")
        if found is None or found.shape != value.shape:
            what = (
                f"{path} is not torchvision's {LPIPS.TITLES[trunk]}: features.{name.partition('.')[2]} is missing or of"
                " another shape"
            )
            raise UserError(what, "expected the file as torchvision publishes it")
        state[name] = found
    network.net.load_state_dict(state)
    return network.eval().requires_grad_(False)
