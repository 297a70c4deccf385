"""The trunks of LPIPS (Zhang et al. 2018) as the package `lpips` has them, and the calibrated weights of their
channels."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.features.base import Features, placed
from d2o.features.common import filled, package
from d2o.interop import torchvision_compat
from d2o.interop.torch_files import read_tensors

if TYPE_CHECKING:
    from lpips import LPIPS

TITLES = {"alex": "AlexNet", "vgg": "VGG-16", "squeeze": "SqueezeNet"}
LEAST = {"alex": 31, "vgg": 16, "squeeze": 17}
"""The smallest sides whose last map still has a place."""
NAMES = tuple(f"lpips-{trunk}" for trunk in TITLES)


class LpipsFeatures(Features):
    """Maps: the activations that LPIPS compares, at the images' own size: five, SqueezeNet's seven. Vector: the means
    over places of all of them. `weights`: the calibrated weight [c] of each channel of each map."""

    network: LPIPS

    def __init__(self, trunk: str, network: LPIPS, sha256: str = ""):
        super().__init__(f"lpips-{trunk}", network, sum(network.chns), sha256, least=LEAST[trunk])

    @property
    def weights(self) -> list[Tensor]:
        return [head.model[-1].weight.flatten() for head in self.network.lins]

    def prepare(self, images: Tensor) -> Tensor:
        return self.network.scaling_layer(images)

    def taps(self, x: Tensor) -> list[Tensor]:
        return list(self.network.net(x))

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        return {"features": torch.cat([found.mean((2, 3)) for found in self.taps(x)], 1)}

    def pool_by_average(self) -> LpipsFeatures:
        """Its maximum poolings become averages over the same windows: over 2 x 2 in VGG-16, as Song et al. 2023 have
        it; over 3 x 3 at every second place in the other trunks, whose maps keep their sizes."""
        for part in list(self.network.modules()):
            for name, layer in part.named_children():
                if isinstance(layer, nn.MaxPool2d):
                    size, stride, padding = layer.kernel_size, layer.stride, layer.padding
                    setattr(part, name, nn.AvgPool2d(size, stride, padding, layer.ceil_mode))
        return self


def load(name: str, weights: Path | None = None, device: str | torch.device = "cpu") -> LpipsFeatures:
    """The trunk `name` of NAMES; `weights`: torchvision's file of it, None: it is looked for.

    UserError: none to be had, or another network's; lpips or torchvision is not installed.
    """
    trunk = name.removeprefix("lpips-")
    network, sha256 = filled(name, partial(untrained_lpips, trunk), partial(read_lpips, trunk), weights, device)
    placed(found := LpipsFeatures(trunk, network, sha256), device, fast=False)
    return found


def untrained_lpips(trunk: str) -> LPIPS:
    """`lpips.LPIPS` of a trunk; never asked for anything of the network. On the meta device it costs nothing."""
    torchvision_compat.ensure()
    try:
        import lpips
    except ImportError as error:
        raise UserError(
            f"LPIPS needs the packages lpips and torchvision ({error})", "pip install 'd2o[eval]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision's arguments, and of heads that no meta device holds
        return lpips.LPIPS(net=trunk, version="0.1", pnet_rand=True, verbose=False)


def heads(trunk: str) -> Path:
    """The file of the linear heads, which comes with the package."""
    return Path(inspect.getfile(package("lpips"))).parent / "weights" / "v0.1" / f"{trunk}.pth"


def read_lpips(trunk: str, path: Path) -> LPIPS:
    """`lpips.LPIPS` with its own linear heads and the trunk from torchvision's file. UserError: as `load`."""
    with torch.device("meta"):  # torchvision would draw the 138 million weights of VGG-16 first
        network = untrained_lpips(trunk)
    tensors, state = read_tensors(path), read_tensors(heads(trunk))
    for name, value in network.net.state_dict().items():  # slice2.3.weight is torchvision's features.3.weight
        theirs = f"features.{name.partition('.')[2]}"
        found = tensors.get(theirs)
        if found is None or found.shape != value.shape:
            what = f"{path} is not torchvision's {TITLES[trunk]}: {theirs} is missing or of another shape"
            raise UserError(what, "expected the file as torchvision publishes it")
        state[f"net.{name}"] = found
    network.load_state_dict(state, strict=False, assign=True)
    return network.eval().requires_grad_(False)
