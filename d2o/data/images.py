"""Real images as uint8 tensors [n, C, H, W] in 0..255, from whatever holds them, with nothing dropped or changed
silently.

`open_images` says which files it could not use (`.bad`) and what it did to the others (`.notes`). Which layouts are
accepted, and how labels and the order come about, is told in sources.py; how a file becomes pixels in decode.py.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from d2o.data import decode
from d2o.data.arrays import Arrays
from d2o.data.layouts import LAYOUTS, ImageSource
from d2o.data.sources import LatentFiles, open_source
from d2o.data.threads import map_threads
from d2o.errors import UserError, unknown

DECODE_AT_ONCE = 1 << 30  # bytes of decoded pixels: smaller sets are held in memory


def to_uint8(x: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8 0..255, rounded as EDM does: trunc(clip(x * 127.5 + 128, 0, 255))."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]; `to_uint8` undoes it exactly."""
    return images.float() / 127.5 - 1


def open_images(
    path: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    channels: int | None = None,
    on_bad: str = "refuse",
    resize: str = "lanczos",
    order: str = "resize_crop",
    limit: int | None = None,
    source: ImageSource | None = None,
) -> ImageSet:
    """The images at `path` (see `layouts.LAYOUTS`), or the first `limit` of them.

    They are resized with the antialiased filter `resize` to a short side of `resolution` pixels and centre-cropped to a
    square, or, in the `order` "crop_resize", cropped to the centre square and then resized (which differs in the last
    bits). `resolution` None keeps the size, which all images must then share; `channels` None is 1 if every image is
    grey, else 3. Files that cannot be used raise a UserError that names them (`on_bad` "refuse") or are left out and
    listed in `.bad` ("skip"). Also raises UserError for a path that is empty, of no known layout or with latents for
    images, and MissingImages for one where nothing is. `source`: what lies at the path, where it is open already.
    """
    if on_bad not in ("refuse", "skip"):
        raise unknown("way to treat bad files (on_bad)", on_bad, ("refuse", "skip"))
    if resize not in decode.FILTERS:
        raise unknown("resize filter", resize, decode.FILTERS)
    if order not in decode.ORDERS:
        raise unknown("order of resizing and cropping", order, decode.ORDERS)
    if resolution is not None and resolution < 1:
        raise UserError(f"a resolution of {resolution} pixels is none", "it is a number of pixels, at least 1")
    if channels not in (None, 1, 3):
        raise UserError(f"images have 1 or 3 channels, not {channels}")
    if limit is not None and limit < 1:
        raise UserError(f"the first {limit} images are none", "a limit is a number of images, at least 1")
    path = os.fspath(path)
    source = source or open_source(path)
    if isinstance(source, LatentFiles):
        raise UserError(f"{set_name(path)} holds stored latents (.npy), and images are needed here", LAYOUTS)
    if limit is not None:
        source.keep(limit)
    return ImageSet(source, set_name(path), resolution, channels, on_bad, resize, order)


def set_name(path: str) -> str:
    """What a set of images is called in messages and records: without its folders."""
    return path if path.startswith("real:") else os.path.basename(os.path.abspath(path))


class ImageSet:
    """An ordered set of images of one shape. `open_images` makes it; threads may share it.

    shape          (C, H, W)
    labels         int64 [n], or None
    classes        how many classes; 0 if unlabelled
    class_names    one for each class: the sub-folder, else the number
    names          of the images, in order
    name           of the set, for messages and records (no folders)
    notes          what was done to the images, and what beside them was ignored: one sentence each

    Sets of at most DECODE_AT_ONCE decoded bytes are decoded when opened. Of larger ones only the headers are read then,
    and a file found bad later follows `on_bad`: a UserError, or the next good image of the same class stands in for it.
    """

    def __init__(
        self,
        source: ImageSource,
        name: str,
        resolution: int | None,
        channels: int | None,
        on_bad: str,
        resize: str,
        order: str = "resize_crop",
    ):
        self._source, self.name, self._resolution, self._skip = source, name, resolution, on_bad == "skip"
        self._resize, self._order = resize, order
        self._bad_at_opening = list(source.bad)
        self._bad_later: dict[int, str] = {}
        self._lock = threading.Lock()

        heads = self._heads()
        rows = [i for i, head in enumerate(heads) if isinstance(head, decode.ImageHead)]
        self._bad_at_opening += [(source.names[i], head) for i, head in enumerate(heads) if isinstance(head, str)]
        good: list[decode.ImageHead] = [head for head in heads if isinstance(head, decode.ImageHead)]
        if not good:
            self._refuse_empty()
        self.shape = self._common_shape([source.names[i] for i in rows], good, channels)

        self._pixels: Tensor | None = None
        if isinstance(source, Arrays) and self._fits_as_is(source):
            self._pixels = torch.from_numpy(source.pixels).permute(0, 3, 1, 2).expand(-1, self.shape[0], -1, -1)
        elif len(rows) * int(np.prod(self.shape)) <= DECODE_AT_ONCE:
            pixels, kept = self._decode_all(rows)
            self._pixels, rows, good = torch.from_numpy(pixels), [rows[k] for k in kept], [good[k] for k in kept]
        if not rows:
            self._refuse_empty()
        if self._bad_at_opening and not self._skip:
            raise self._bad_files(self.bad)

        self._rows = rows
        self._digests = np.zeros(len(rows), np.uint64)  # of pixels, as far as they were read; 0: not yet
        self.names = [source.names[i] for i in rows]
        self.class_names = list(source.class_names)
        self.classes = len(self.class_names)
        self.labels = (
            None if source.labels is None else torch.tensor([source.labels[i] for i in rows], dtype=torch.int64)
        )
        self.notes = [*source.notes, *self._conversions(good)]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"ImageSet({self.name!r}, {len(self)} images of {list(self.shape)}, {self.classes} classes, {len(self.bad)}"
            " bad)"
        )

    @property
    def bad(self) -> list[tuple[str, str]]:
        """(name, why) of every file left out, in order of the names."""
        with self._lock:
            later = [(self.names[i], why) for i, why in self._bad_later.items()]
        return sorted(set(self._bad_at_opening + later))

    @property
    def fingerprint(self) -> str:
        """sha256 of what was found at the path, bad or not, before resizing: names, sizes in bytes and labels (npz: the
        pixels)."""
        return self._source.fingerprint

    @property
    def duplicates(self) -> int:
        """How many of the images are pixel for pixel copies of an earlier one: of all, or of those read so far where a
        set is decoded on demand. What several ranks generate from the same seeds shows here."""
        if self._pixels is not None and len(self) and not self._digests.any():
            pixels = self._pixels.numpy()
            self._digests[:] = map_threads(lambda i: _digest(pixels[i]), range(len(self)))
        known = self._digests[self._digests != 0]
        return len(known) - len(np.unique(known))

    def images(self, indices: Sequence[int] | Tensor | np.ndarray | slice) -> Tensor:
        """uint8 [k, C, H, W], in the order asked for; negative indices count from the end. IndexError outside the
        set."""
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        wanted = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if wanted.numel() and (int(wanted.min()) < -len(self) or int(wanted.max()) >= len(self)):
            raise IndexError(
                f"{self.name} has {len(self)} images; asked for {int(wanted.min())} to {int(wanted.max())}"
            )
        wanted = wanted % len(self)
        if self._pixels is not None:
            # By numpy: in a thread of its own a parallel operation of torch would start a second set of OpenMP threads.
            return torch.from_numpy(np.ascontiguousarray(self._pixels.numpy()[wanted.numpy()]))
        unique, places = torch.unique(wanted, return_inverse=True)
        out = np.empty((len(unique), *self.shape), np.uint8)
        failed = [
            (int(unique[k]), k) for k, why in enumerate(_threaded(self._decode_later, unique.tolist(), out)) if why
        ]
        if failed and not self._skip:
            raise self._bad_files([(self.names[i], self._bad_later[i]) for i, _ in failed])
        for i, k in failed:
            self._stand_in(i, out[k])
        return torch.from_numpy(out)[places]

    def _heads(self) -> list[decode.ImageHead | str]:
        if isinstance(self._source, Arrays):
            return [self._source.head(i) for i in range(len(self._source))]

        def head(i: int) -> decode.ImageHead | str:
            try:
                return self._source.head(i)
            except MemoryError:
                raise
            except Exception as error:  # PIL's decoders raise nearly everything
                return decode.reason(error)

        return map_threads(head, range(len(self._source)))

    def _common_shape(
        self, names: list[str], heads: list[decode.ImageHead], channels: int | None
    ) -> tuple[int, int, int]:
        channels = channels or (1 if all(head.grey for head in heads) else 3)
        if self._resolution is not None:
            return channels, self._resolution, self._resolution
        width, height = heads[0].size
        for name, head in zip(names, heads, strict=True):
            if head.size != heads[0].size:
                sizes = f"{names[0]} is {width}x{height}, {name} is {head.size[0]}x{head.size[1]}"
                raise UserError(
                    f"the images of {self.name} differ in size: {sizes}",
                    "set the resolution to resize and crop them to",
                )
        return channels, height, width

    def _fits_as_is(self, source: Arrays) -> bool:
        _, height, width, channels = source.pixels.shape
        return (height, width) == self.shape[1:] and channels in (1, self.shape[0])

    def _decode(self, row: int, out: np.ndarray) -> None:
        pixels = decode.decode(self._source.picture(row), self.shape[0], self._resolution, self._resize, self._order)
        if pixels.shape != out.shape:
            raise ValueError(
                f"is {pixels.shape[2]}x{pixels.shape[1]}, but its header says {out.shape[2]}x{out.shape[1]}"
            )
        out[:] = pixels

    def _decode_all(self, rows: list[int]) -> tuple[np.ndarray, list[int]]:
        out = np.empty((len(rows), *self.shape), np.uint8)

        def one(row: int, out: np.ndarray) -> str:
            try:
                self._decode(row, out)
            except MemoryError:
                raise
            except Exception as error:
                return decode.reason(error)
            return ""

        whys = _threaded(one, rows, out)
        self._bad_at_opening += [(self._source.names[row], why) for row, why in zip(rows, whys, strict=True) if why]
        kept = [k for k, why in enumerate(whys) if not why]
        return (out if len(kept) == len(rows) else out[kept]), kept

    def _decode_later(self, index: int, out: np.ndarray) -> str:
        """Decodes image `index` into `out`; says why it cannot (and records it), else ""."""
        why = self._bad_later.get(index, "")
        if not why:
            try:
                self._decode(self._rows[index], out)
                if not self._digests[index]:
                    self._digests[index] = _digest(out)
            except MemoryError:
                raise
            except Exception as error:
                why = decode.reason(error)
                with self._lock:
                    self._bad_later[index] = why
        return why

    def _stand_in(self, index: int, out: np.ndarray) -> None:
        """The next good image of the same class: it depends on the files alone, not on what was read before."""
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            if (self.labels is None or self.labels[other] == self.labels[index]) and not self._decode_later(other, out):
                return
        raise self._bad_files(
            [(self.names[index], f"{self._bad_later[index]}, and no other image of its class is good")]
        )

    def _bad_files(self, bad: list[tuple[str, str]]) -> UserError:
        total = len(self._source) + len(self._source.bad)
        text = f"{len(bad)} bad {'file' if len(bad) == 1 else 'files'} of {total} in {self.name}:{list_bad(bad)}"
        return UserError(text, "" if self._skip else "--on-bad skip leaves them out")

    def _refuse_empty(self) -> None:
        bad = sorted(set(self._bad_at_opening))
        if bad:
            raise UserError(f"no good image in {self.name}:{list_bad(bad)}", LAYOUTS)
        raise UserError(f"no images in {self.name}" + "".join(f"; {note}" for note in self._source.notes), LAYOUTS)

    def _conversions(self, heads: list[decode.ImageHead]) -> list[str]:
        counts = Counter(trait for head in heads for trait in head.traits)
        grey = sum(head.grey for head in heads)
        if self.shape[0] == 3:
            counts["repeated from grey to 3 channels"] = grey
        else:
            counts["reduced from colour to grey (ITU-R 601 luma)"] = len(heads) - grey
        if self._resolution is not None:
            side = self._resolution
            if self._order == "crop_resize":
                counts["cropped to the centre square"] = 0  # notes are in the order of what was done
            counts[f"shrunk to a short side of {side} ({self._resize})"] = sum(min(head.size) > side for head in heads)
            counts[f"enlarged to a short side of {side} ({self._resize})"] = sum(
                min(head.size) < side for head in heads
            )
            counts["cropped to the centre square"] = sum(head.size[0] != head.size[1] for head in heads)
        return [f"{count} {'image' if count == 1 else 'images'} {what}" for what, count in counts.items() if count]


def save_png_bytes(image: Tensor) -> bytes:
    """A PNG file of uint8 [C, H, W], C 1 (grey) or 3 (RGB).

    Written here because samplers write tens of thousands of tiny files: 11 microseconds for 8x8 where PIL at its
    fastest setting takes 26, 70 against 114 for 32x32, 1.6 ms against 3.3 for 256x256, at about the same size. zlib
    releases the GIL.
    """
    channels, height, width = image.shape
    pixels = image.cpu().numpy().transpose(1, 2, 0).reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = 2  # each row as its difference to the one above
    rows[:, 1:] = pixels
    rows[1:, 1:] -= pixels[:-1]
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.data, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def list_bad(bad: list[tuple[str, str]]) -> str:
    """(name, why) of files, a line each: the first ten, and how many more."""
    lines = [f"\n  {name}: {why}" for name, why in bad[:10]]
    return "".join(lines) + (f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else "")


def _digest(pixels: np.ndarray) -> int:
    """64 bits of a hash of the pixels, never 0."""
    return (
        int.from_bytes(hashlib.sha1(np.ascontiguousarray(pixels).data, usedforsecurity=False).digest()[:8], "little")
        | 1
    )


def _threaded(function: Callable[[int, np.ndarray], str], numbers: Sequence[int], out: np.ndarray) -> list[str]:
    """function(numbers[k], out[k]) for every k."""
    return map_threads(lambda k: function(numbers[k], out[k]), range(len(numbers)))
