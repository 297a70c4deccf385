"""Images that are held as one array: of an npz, or of what the authors of CIFAR-10 pickled."""

from __future__ import annotations

import functools
import hashlib
import posixpath
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from d2o.data import decode
from d2o.data.containers import ArchiveMember, Container, printable
from d2o.data.layouts import LAYOUTS, ImageSource, Reason, read_label
from d2o.errors import UserError
from d2o.interop.inert_pickle import Malformed
from d2o.interop.npz import DAMAGED, read_npz
from d2o.interop.numpy_pickle import HINT, loads


class Arrays(ImageSource):
    """Images held as one array `pixels`: uint8 [n, H, W, C], C 1, 3 or 4 (alpha). The fingerprint covers the pixels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None = None, class_names: list[str] | None = None):
        self.bad, self.notes = [], []
        self._all, self._all_labels = pixels, labels
        names = [f"{i:08d}" for i in range(len(pixels))]
        self.names, self.labels, self.class_names, self.pixels = names, None, [], pixels
        if labels is not None:
            found = [read_label(value) for value in labels.tolist()]
            self.labels = [label for label in found if not isinstance(label, Reason)]
            self.bad = [(name, label) for name, label in zip(names, found) if isinstance(label, Reason)]
            if self.bad:
                good = [i for i, label in enumerate(found) if not isinstance(label, Reason)]
                self.names, self.pixels = [names[i] for i in good], pixels[good]
            self.class_names = class_names or [str(c) for c in range(max(self.labels, default=-1) + 1)]

    def head(self, index: int) -> decode.ImageHead:
        _, height, width, channels = self.pixels.shape
        return decode.ImageHead(
            (width, height), channels == 1, ("with alpha composited on white",) if channels == 4 else ()
        )

    def picture(self, index: int) -> Image.Image:
        pixels = np.ascontiguousarray(self.pixels[index])
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def keep(self, count: int) -> None:
        super().keep(count)
        self.pixels = self.pixels[:count]

    def _found(self) -> str:
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        stamp = hashlib.sha256(f"{self._all.shape}".encode())
        for image in self._all:
            stamp.update(image.tobytes())
        if self._all_labels is not None:
            stamp.update(repr(self._all_labels.tolist()).encode())
        return stamp.hexdigest()


def open_npz(path: str) -> Arrays:
    try:
        with zipfile.ZipFile(path) as file:
            names = [name.removesuffix(".npy") for name in file.namelist()]
        key = next((key for key in ("images", "x", "arr_0") if key in names), None)
        if key is None:
            hint = (
                "d2o eval --against takes statistics; here images are needed"
                if {"mu", "sigma"} <= set(names)
                else LAYOUTS
            )
            shown = ", ".join(map(printable, names[:20])) + (", ..." if len(names) > 20 else "")
            raise UserError(f"{path} holds no array named images, x or arr_0, but: {shown or 'nothing'}", hint)
        labels_key = next((key for key in ("labels", "y", "arr_1") if key in names), None)
        loaded = read_npz(path, lambda name: name in (key, labels_key))
        pixels, labels = loaded[key], None if labels_key is None else loaded[labels_key]
    except DAMAGED as error:
        raise UserError(
            f"{path} is not a readable npz: {error}", "it may be cut off, or hold Python objects (not read)"
        ) from error
    if pixels.dtype != np.uint8:
        raise UserError(f"{path}: {key} is {pixels.dtype}, not uint8", "save pixels as uint8, 0 to 255")
    source = Arrays(_channels_last(pixels, f"{path}: {key}"), _label_row(labels, len(pixels), f"{path}: {labels_key}"))
    if labels_key is not None:
        source.notes.append(f"labels from the array {labels_key!r}")
    return source


def _channels_last(pixels: np.ndarray, what: str) -> np.ndarray:
    """[n, H, W, C] of NHWC, NCHW (where only the second axis can be channels) or NHW."""
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    elif pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4) and pixels.shape[1] in (1, 3, 4):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3, 4) or 0 in pixels.shape[1:]:
        raise UserError(
            f"{what} has shape {list(pixels.shape)}", "expected [n, H, W, C], [n, C, H, W] (C 1, 3 or 4) or [n, H, W]"
        )
    return pixels


def _label_row(labels: np.ndarray | None, count: int, what: str) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise UserError(f"{what} has shape {list(labels.shape)}", f"expected one label for each of the {count} images")
    return labels


CIFAR_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


def open_cifar(container: Container, path: str) -> Arrays | None:
    """CIFAR-10's training images in their authors' order (EDM's zip has the same), if `container` holds them as they
    were published: pickles, read as data, never executed. None if it holds something else. UserError: a batch that is
    missing or damaged.
    """
    folders = {
        posixpath.dirname(member.path)
        for member in container.members
        if posixpath.basename(member.path) in CIFAR_BATCHES
    }
    if len(folders) != 1:
        return None
    folder = folders.pop()
    members = {
        posixpath.basename(member.path): member
        for member in container.members
        if posixpath.dirname(member.path) == folder
    }
    if missing := [name for name in CIFAR_BATCHES if name not in members]:
        raise UserError(
            f"{path} holds CIFAR-10 without {', '.join(missing)}",
            "it may be cut off: the original .tar.gz has 170,498,071 bytes",
        )
    batches = [_cifar_batch(container, members[name]) for name in CIFAR_BATCHES]
    pixels = np.concatenate([batch[0] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = _unpickled(container, members["batches.meta"]).get("label_names") if "batches.meta" in members else None
    named = isinstance(names, list) and len(names) == 10 and all(isinstance(name, str) for name in names)
    source = Arrays(pixels, np.array([label for batch in batches for label in batch[1]]), names if named else None)
    source.bad += container.bad
    source.notes.append(
        "CIFAR-10's training set, as its authors packed it"
        + ("; its test set is left out" if "test_batch" in members else "")
    )
    return source


def _cifar_batch(container: Container, member: ArchiveMember) -> tuple[np.ndarray, list[int]]:
    values = _unpickled(container, member)
    pixels, labels = values.get("data"), values.get("labels")
    if not (
        isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2 and pixels.shape[1] == 3072
    ):
        raise UserError(f"{container.place(member)} holds no images of CIFAR-10", "expected: `data`, uint8 [n, 3072]")
    if not (
        isinstance(labels, list)
        and len(labels) == len(pixels)
        and all(type(label) is int and 0 <= label < 10 for label in labels)
    ):
        raise UserError(
            f"{container.place(member)} holds no labels of CIFAR-10",
            "expected: `labels`, a number from 0 to 9 for each image",
        )
    return pixels, labels


def _unpickled(container: Container, member: ArchiveMember) -> dict[Any, Any]:
    try:
        values = loads(container.read(member), python2=True)
    except OSError as error:
        raise UserError(f"cannot read {container.place(member)}: {error.strerror or error}") from error
    except Malformed as error:
        raise UserError(f"{container.place(member)} {error}", HINT) from error
    return values if isinstance(values, dict) else {}
