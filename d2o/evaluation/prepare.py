"""What is done to images before they are scored, as the user asked for it and as results state it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2o.data.decode import decode
from d2o.data.images import to_uint8
from d2o.data.threads import map_threads
from d2o.errors import UserError, unknown

QUANTIZERS = ("edm_round", "dmd_trunc")
FORMS = "none; crop (to the extractor's own size); or a size with its filter: 256, 256:lanczos, 256:bicubic"
LARGEST = 4096


class OpenOptions(TypedDict, total=False):
    """Options of `data.images.open_images`."""

    resolution: int | None
    channels: int | None
    resize: str
    order: str


@dataclass(frozen=True)
class Preparation:
    """One way to bring images to the size at which they are scored.

    "none": as they are. "crop": the short side resized with Lanczos to the size that the extractor takes, then the
    centre cropped; that size and the channels are filled in by `sized`. "256", "256:bicubic": the centre square cut out
    first, then resized to 256 pixels with PIL's antialiased filter on 8 bits, which is how GigaGAN and DMD2 score COCO
    (code: Lanczos, the default; GigaGAN's text says bicubic).
    """

    text: str
    resolution: int | None = None
    filter: str = "lanczos"
    order: str = "resize_crop"
    channels: int | None = None

    @property
    def changes(self) -> bool:
        """Whether anything is done to images."""
        return self.text != "none"

    def describe(self) -> str:
        """What results state, e.g. "center_crop+lanczos256"."""
        if not self.changes:
            return "none"
        return f"center_crop+{self.filter}{self.resolution}" if self.order == "crop_resize" else "lanczos+centre_crop"

    def sized(self, shape: tuple[int, int, int] | None) -> Preparation:
        """The same with the size filled in that the extractor takes, (C, H, W). UserError: "crop" where it takes any
        size, or no square."""
        if self.text != "crop":
            return self
        if shape is None:
            raise UserError(
                "--resize crop crops to the size that the extractor takes, but it takes any size", f"accepted: {FORMS}"
            )
        if shape[1] != shape[2]:
            raise UserError(f"--resize crop makes squares, but the extractor takes {shape[2]}x{shape[1]} pixels")
        return replace(self, resolution=shape[2], channels=shape[0])

    def reading(self) -> OpenOptions:
        """The options of `data.images.open_images` that do this to files, which may then differ in size."""
        if not self.changes:
            return {}
        self._check()
        return {"resolution": self.resolution, "channels": self.channels, "resize": self.filter, "order": self.order}

    def apply(self, images: Tensor) -> Tensor:
        """uint8 [n, C, H, W], C 1 or 3 -> uint8 [n, C', R, R] on the same device, on the threads that also decode
        files.

        The pixels are those that `reading` gives for the same images as PNG files; images of the right size are left as
        they are.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images are prepared as uint8, not {images.dtype}")
        if not self.changes:
            return images
        side, channels = self._check(), self.channels or images.shape[1]
        if images.shape[1:] == (channels, side, side) or not len(images):
            return images
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()

        def one(image: np.ndarray) -> np.ndarray:
            picture = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))
            return decode(picture, channels, side, self.filter, self.order)

        return torch.from_numpy(np.stack(map_threads(one, pixels))).to(images.device)

    def _check(self) -> int:
        if self.resolution is None:
            raise ValueError("the size of 'crop' is that of the extractor: call sized() first")
        return self.resolution


def parse_preparation(text: str) -> Preparation:
    """A preparation as users write it. UserError, with the forms, for anything else."""
    if text in ("none", "crop"):
        return Preparation(text)
    found = re.fullmatch(r"(\d{1,6})(?::(lanczos|bicubic))?", text, re.ASCII)
    if not found:
        raise UserError(f"--resize {text!r} is not a way to prepare images", f"accepted: {FORMS}")
    size = int(found[1])
    if not 8 <= size <= LARGEST:
        raise UserError(
            f"--resize {text!r}: a size of {size} pixels is out of range (8 to {LARGEST})", f"accepted: {FORMS}"
        )
    return Preparation(text, size, found[2] or "lanczos", "crop_resize")


def quantize(x: Tensor, mode: str = "edm_round") -> Tensor:
    """Floats [...] in [-1, 1] -> uint8 of the same shape; values beyond are clipped, NaN must be refused before.

    "edm_round": x * 127.5 + 128, cut off, which rounds halves up (EDM, SiD). "dmd_trunc": (x + 1) * 127.5, cut off
    (GigaGAN, DMD2): half a level darker on average, so the two must not be mixed.
    """
    if mode == "edm_round":
        return to_uint8(x)
    if mode != "dmd_trunc":
        raise unknown("quantisation", mode, QUANTIZERS)
    return ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
