"""What every frozen network with taps is: differentiable in its images, its own weights nobody's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor, nn

from d2o.errors import UserError

OUTPUTS = ("features", "spatial", "logits")
"""What a network may say of an image as a whole: a feature vector, a vector of a layer that still knows places (sFID),
class logits."""


class Features(nn.Module, ABC):
    """A frozen network that images are looked at through. Gradients flow to the images and to nothing else.

    In eval mode for ever: `train()` changes nothing. Its weights are buffers that no state dict holds: a critic or a
    method that has it as a part neither trains, averages nor saves it, and it moves to a device with that part.
    `name`, and `sha256` of the weights file ("" where none was read); `dim` of the vector; `shape` (C, H, W) of the
    images it takes, None: any size and as many channels as `takes` says (1 or 3: grey is repeated); `resize`: what
    it does to their size; `least`: the smallest side it takes; `classes` that it tells apart (0: none); `has`: which
    of OUTPUTS it gives. `size`: of a network that resizes images itself and would work at other sizes too, the pixels
    to which it does; a distance may set another, an evaluation does not.
    """

    size: int | None = None

    def __init__(
        self,
        name: str,
        network: nn.Module,
        dim: int,
        sha256: str = "",
        *,
        shape: tuple[int, int, int] | None = None,
        resize: str = "none",
        least: int = 1,
        classes: int = 0,
        takes: tuple[int, ...] = (1, 3),
        outputs: Collection[str] = ("features",),
    ):
        super().__init__()
        self.name, self.dim, self.sha256, self.shape, self.resize = name, dim, sha256, shape, resize
        self.least, self.classes, self.takes, self.has = least, classes, takes, tuple(outputs)
        self.network = hold(network)
        self.eval()

    # What a network brings ----------------------------------------------------------------------------------------

    def prepare(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] in [-1, 1] -> what `taps` and `outputs` take, normalised and of the network's size."""
        return self.from_pixels((images + 1) * 127.5)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """The same of floats [n, 3, h, w] in [0, 255]: how 8-bit images come in."""
        return self.prepare(pixels / 127.5 - 1)

    @abstractmethod
    def taps(self, x: Tensor) -> list[Tensor]:
        """Prepared images -> feature maps [n, c, h, w], fine first."""

    @abstractmethod
    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Prepared images -> each of `wanted` (of what it `has`), [n, d], in one pass."""

    # What is asked of it ------------------------------------------------------------------------------------------

    def maps(self, images: Tensor) -> list[Tensor]:
        """Float images [B, 1 or 3, H, W] in [-1, 1] -> feature maps [B, c, h, w], fine first. UserError: images of a
        shape that it does not take."""
        return self.taps(self.prepare(self.checked(images)))

    def vector(self, images: Tensor) -> Tensor:
        """Float images [B, 1 or 3, H, W] in [-1, 1] -> the feature vectors [B, dim]. UserError as `maps`."""
        return self.outputs(self.prepare(self.checked(images)), ("features",))["features"]

    def logits(self, images: Tensor) -> Tensor:
        """Float images [B, 1 or 3, H, W] in [-1, 1] -> class logits [B, classes]. UserError as `maps`, and where it
        tells no classes apart."""
        if "logits" not in self.has:
            raise UserError(f"{self.name!r} has no logits", f"it has {', '.join(self.has)}")
        return self.outputs(self.prepare(self.checked(images)), ("logits",))["logits"]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps(images)

    def checked(self, images: Tensor) -> Tensor:
        """The images, grey ones in three channels where the network takes colour. UserError: another shape."""
        if not images.is_floating_point():
            raise TypeError(f"features are taken of float images in [-1, 1], not {images.dtype}")
        check_shape(tuple(images.shape[1:]), self)
        return coloured(images, self)

    def train(self, mode: bool = True) -> Features:
        """Stays in eval mode: dropout off, batch norms with the statistics that were published."""
        return super().train(False)


def hold(network: nn.Module) -> nn.Module:
    """The network, all that it holds turned into buffers which are not part of its state: nothing can train or save
    them. Weights that two layers share stay shared."""
    held: dict[int, Tensor] = {}
    for module in network.modules():
        for name, parameter in [*module._parameters.items()]:
            if parameter is None:
                continue
            del module._parameters[name]
            module.register_buffer(name, held.setdefault(id(parameter), parameter.detach()))
            module.__dict__.setdefault("_held", []).append(name)
        module._non_persistent_buffers_set.update(module._buffers)
    return network


def release(features: Features, images: Tensor) -> list[Tensor]:
    """Make parameters again of the weights that its maps of such images depend on: they are trained, saved and copied
    as those of any network, where a critic begins with them. What was no parameter (statistics of batch norms) stays as
    it is, and so does eval mode. The maps."""
    places = [(module, name) for module in features.network.modules() for name in module.__dict__.get("_held", [])]
    freed = {id(module._buffers[name]): nn.Parameter(module._buffers[name]) for module, name in places}  # type: ignore[arg-type]
    places = [(module, name, freed[id(module._buffers.pop(name))]) for module, name in places]  # type: ignore[misc]
    for module, name, weight in places:  # type: ignore[misc]
        module.register_parameter(name, weight)
    with torch.enable_grad():
        maps = features.maps(images)
        found = torch.autograd.grad([y.sum() for y in maps], list(freed.values()), allow_unused=True)
    used = {id(weight) for weight, gradient in zip(freed.values(), found) if gradient is not None}
    for module, name, weight in places:  # type: ignore[misc]
        if id(weight) not in used:
            del module._parameters[name]
            module.register_buffer(name, weight.detach(), persistent=False)
        else:
            module._non_persistent_buffers_set.discard(name)
    return [y.detach() for y in maps]


def coloured(images: Tensor, features: Features) -> Tensor:
    """Grey images [n, 1, h, w] three times over, where the network takes images of any kind."""
    if features.shape is None and features.takes == (1, 3) and images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    return images


def check_shape(shape: tuple[int, ...], features: Features, of: str = "the images") -> None:
    """UserError unless images of `shape` (C, H, W) fit the network."""
    check_fit(shape, features.name, features.shape, of, features.takes, features.least)


def check_fit(
    shape: tuple[int, ...],
    name: str,
    wanted: tuple[int, int, int] | None,
    of: str = "the images",
    takes: tuple[int, ...] = (1, 3),
    least: int = 1,
) -> None:
    """UserError unless images of `shape` (C, H, W) are what the extractor `name` takes: those of the shape `wanted`;
    where that is None, of so many channels and sides of at least `least`."""
    if wanted is None and shape[0] not in takes:
        of_these = " or ".join(map(str, takes))
        raise UserError(f"{of} are {describe_shape(shape)}, but the extractor {name!r} takes {of_these} channels")
    if wanted is None and min(shape[1:]) < least:
        raise UserError(f"{of} are {describe_shape(shape)}, but the extractor {name!r} takes {least}x{least} and more")
    if wanted is not None and shape != wanted:
        raise UserError(
            f"{of} are {describe_shape(shape)}, but the extractor {name!r} takes {describe_shape(wanted)}",
            "give another --extractor; for a set of images --resize crop scales and centre-crops, and the result"
            " says so",
        )


def describe_shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} pixels of {channels} channel{'s' if channels > 1 else ''}"


def placed(features: Features, device: str | torch.device, *, fast: bool = True) -> Features:
    """The features on the device, in single precision; `fast`: their weights in the memory order in which convolutions
    are faster there (CPU: 1.5 times for Inception). The kernels of that order round otherwise, and a unit of a ReLU
    that this puts on the other side moves a gradient by 1e-3: distances that students are trained by go without."""
    features.to(device, torch.float32)
    if fast and torch.device(device).type == "cpu":
        features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return features
