"""Stored latents: what EDM2's `dataset_tool.py encode` writes, for training in latent space without the autoencoder.

An archive like one of images, whose members are `.npy` files: the mean and the standard deviation of one image's
latent, one after the other in an array [2C, h, w] (ImageNet at 512 px: [8, 64, 64]), with labels in dataset.json. A
latent is drawn anew every time an image is used.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2o.data.images import ImageSet, list_bad, open_images, set_name
from d2o.data.sources import LatentFiles, open_source
from d2o.data.threads import map_threads
from d2o.errors import UserError
from d2o.interop.npz import read_npy

PIXELS = 8
"""Pixels of an image along one value of its latent."""


class LatentSet:
    """An ordered set of stored latents, read on demand; with the attributes of `ImageSet`, where `shape` is (2C, h,
    w)."""

    def __init__(self, source: LatentFiles, name: str, on_bad: str = "refuse"):
        self._source, self.name = source, name
        sizes = [source.size(i) for i in range(len(source))]
        if not sizes:
            raise UserError(f"no latents in {name}")
        usual = Counter(sizes).most_common(1)[0][0]
        self.bad = sorted(
            [
                *source.bad,
                *(
                    (source.names[i], f"{size} bytes, the others {usual}")
                    for i, size in enumerate(sizes)
                    if size != usual
                ),
            ]
        )
        if self.bad and on_bad == "refuse":
            count = f"{len(self.bad)} bad {'file' if len(self.bad) == 1 else 'files'}"
            raise UserError(f"{count} in {name}:{list_bad(self.bad)}", "--on-bad skip leaves them out")
        self._rows = [i for i, size in enumerate(sizes) if size == usual]
        self.names = [source.names[i] for i in self._rows]
        self.class_names = list(source.class_names)
        self.classes = len(self.class_names)
        self.labels = (
            None if source.labels is None else torch.tensor([source.labels[i] for i in self._rows], dtype=torch.int64)
        )
        self.notes = [*source.notes, f"{len(self)} stored latents, mean and standard deviation: nothing is encoded"]
        channels, height, width = self._read(0).shape
        self.shape: tuple[int, int, int] = (channels, height, width)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """sha256 of what was found at the path: names, sizes in bytes and labels."""
        return self._source.fingerprint

    def images(self, indices: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """float32 [k, 2C, h, w]: means, then standard deviations. UserError: a file is damaged."""
        wanted = torch.as_tensor(indices, dtype=torch.int64).reshape(-1).tolist()
        out = np.empty((len(wanted), *self.shape), np.float32)

        def one(k: int) -> None:
            out[k] = self._read(wanted[k])

        map_threads(one, range(len(wanted)))
        return torch.from_numpy(out)

    def _read(self, index: int) -> np.ndarray:
        try:
            values = read_npy(self._source.read(self._rows[index]))
        except (OSError, ValueError) as error:
            raise self._damaged(index, f"no readable .npy: {error}") from error
        if values.ndim != 3 or values.shape[0] % 2 or values.dtype.kind != "f" or 0 in values.shape:
            raise self._damaged(
                index,
                f"holds {values.dtype} {list(values.shape)}, not the floats [2C, h, w] of means and standard"
                " deviations",
            )
        if index and values.shape != self.shape:
            raise self._damaged(index, f"has shape {list(values.shape)}, the first one {list(self.shape)}")
        if not np.isfinite(values).all() or (values[len(values) // 2 :] < 0).any():
            raise self._damaged(index, "holds values that are not finite, or negative standard deviations")
        return values.astype(np.float32, copy=False)

    def _damaged(self, index: int, why: str) -> UserError:
        return UserError(
            f"{self.names[index]} in {self.name} {why}",
            "it is what `dataset_tool.py encode` of EDM2 writes that is read here",
        )


def open_set(
    path: str | os.PathLike[str], *, resolution: int | None, channels: int | None, on_bad: str, limit: int | None
) -> ImageSet | LatentSet:
    """What lies at `path`: images as `open_images` reads them, or stored latents. `resolution` of latents is that of
    the images they were made of.

    UserError: as `open_images`; latents of another resolution than asked for.
    """
    source = open_source(os.fspath(path))
    if not isinstance(source, LatentFiles):
        return open_images(path, resolution=resolution, channels=channels, on_bad=on_bad, limit=limit, source=source)
    if limit is not None:
        source.keep(limit)
    found = LatentSet(source, set_name(os.fspath(path)), on_bad)
    size = (PIXELS * found.shape[1], PIXELS * found.shape[2])
    if resolution is not None and size != (resolution, resolution):
        raise UserError(
            f"{found.name} holds latents of images of {size[0]} x {size[1]}, and data.resolution is {resolution}"
        )
    return found
