"""What the networks share: images to the size and range of a network, in the ways that published numbers use, weights
into it, and maps out of it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.interop import torchvision_compat
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.weights import find_weights, want
from d2o.networks.fill import fill_network

N = TypeVar("N", bound=nn.Module)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1]."""

CHUNK = 64
"""Images in a network at a time on an accelerator, whatever the batch is."""


def at_once(device: torch.device, side: int = 224) -> int:
    """Images of `side` pixels in a network at a time. On a CPU few, so that activations stay in the cache (at 224,
    EfficientNet-lite0 on 2 cores makes 33 images/s by 48, 75 by 4), of small ones as many as have the same pixels (at
    64, an iteration of GDD on one core takes 0.83 s by 4, 0.57 by 16)."""
    if device.type != "cpu":
        return CHUNK
    return max(4, min(CHUNK, round(2 * torch.get_num_threads() * (224 / side) ** 2)))


def package(module: str) -> ModuleType:
    """An optional package's module, imported. UserError: it is not installed."""
    torchvision_compat.ensure()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs the package {module.partition('.')[0]!r}, which is not there ({error})",
            "pip install 'd2o[eval]'",
        ) from error


def bicubic(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Images [n, C, h, w] in [0, 255] -> float32 [n, C, size, size] about [0, 255]: torch's bicubic with antialiasing,
    neither clipped nor rounded.

    EDM2's FD-DINOv2 is computed so.
    """
    size = (size, size) if isinstance(size, int) else size
    return F.interpolate(images.to(torch.float32), size, mode="bicubic", align_corners=False, antialias=True)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images [n, 3, h, w] in [0, 255] -> (x / 255 - mean) / std, per channel, float32."""
    return standardise(x.to(torch.float32) / 255, mean, std)


def standardise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images [n, 3, h, w] -> (x - mean) / std, per channel."""
    shift, scale = (torch.tensor(values, dtype=torch.float32, device=x.device)[:, None, None] for values in (mean, std))
    return (x - shift) / scale


def token_map(tokens: Tensor, first: int) -> Tensor:
    """Tokens [n, first + s * s, d] of a vision transformer -> the map [n, d, s, s] of those of places."""
    places = tokens[:, first:]
    side = round(places.shape[1] ** 0.5)
    return places.transpose(1, 2).unflatten(2, (side, side))


def watch(blocks: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """What the blocks at a quarter, a half, three quarters and the whole of the depth give while `run` runs."""
    found: dict[int, Tensor] = {}
    depths = sorted({math.ceil(len(blocks) * k / 4) - 1 for k in (1, 2, 3, 4)})

    def keep(i: int) -> Callable[..., None]:
        return lambda module, inputs, output: found.__setitem__(i, output)

    hooks = [blocks[i].register_forward_hook(keep(i)) for i in depths]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [found[i] for i in depths]


def filled(
    name: str, build: Callable[[], N], read: Callable[[Path], N], weights: Path | None, device: str | torch.device
) -> tuple[N, str]:
    """The network with the weights called `name`, from the file `weights` or from where `find_weights` has them, and
    the file's sha256. On the meta device, for what it costs, no weights are looked for."""
    if torch.device(device).type == "meta":
        want(name, weights)
        with torch.device("meta"):
            return build().eval().requires_grad_(False), ""
    path = find_weights(name, weights)
    return read(path), file_sha256(path)


def fit(network: N, tensors: dict[str, Tensor], path: str | Path, what: str, hint: str) -> N:
    """The network with these tensors, frozen, in eval mode and single precision. UserError: they are not exactly its
    own."""
    needed = network.state_dict()
    missing = [name for name in needed if name not in tensors]
    foreign = [name for name in tensors if name not in needed]
    if missing:
        raise UserError(
            f"{path} is not {what}: it has no {missing[0]!r} ({len(missing)} of {len(needed)} tensors missing)", hint
        )
    if foreign:
        raise UserError(f"{path} is not {what}: it also has {foreign[0]!r} ({len(foreign)} tensors too many)", hint)
    for name, value in needed.items():
        if tensors[name].shape != value.shape:
            found = f"{name!r} has the shape {tuple(tensors[name].shape)}, not {tuple(value.shape)}"
            raise UserError(f"{path} is not {what}: {found}", hint)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return fill_network(network, tensors, path, assign=True).eval().requires_grad_(False)
