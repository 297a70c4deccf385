"""What every layout of images gives, and the list of them all."""

from __future__ import annotations

import hashlib

from PIL import Image

from d2o.data import decode

LAYOUTS = (
    "accepted: a folder of images (a class is a sub-folder, or labels in dataset.json), an EDM-style .zip, WebDataset"
    " .tar/.tar.gz (shards as name-{000..009}.tar or name-*.tar), an .npz, an LMDB of image files (LSUN's folders),"
    " CIFAR-10's cifar-10-python.tar.gz or its folder, real:digits, real:digits/a, real:digits/b"
)
MAX_CLASSES = 1_000_000


class Reason(str):
    """In the place of a label: why there is none."""


class ImageSource:
    """Images by number: `names`, `labels` (None for all, or an int each) and `class_names` fit each other; `bad` is
    left out of them."""

    names: list[str]
    labels: list[int] | None
    class_names: list[str]
    bad: list[tuple[str, str]]
    notes: list[str]
    _kept: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def head(self, index: int) -> decode.ImageHead:
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image:
        raise NotImplementedError

    def keep(self, count: int) -> None:
        """Leave out all images but the first `count`; their classes stay."""
        if count < len(self):
            self.notes.append(f"the first {count} of {len(self)} images, as asked")
            self._kept = count
        self.names = self.names[:count]
        self.labels = None if self.labels is None else self.labels[:count]

    @property
    def fingerprint(self) -> str:
        """sha256 over what was found, good or bad, before any resizing, and over how many of it were kept."""
        found = self._found()
        return found if self._kept is None else hashlib.sha256(f"{found} {self._kept}".encode()).hexdigest()

    def _found(self) -> str:
        raise NotImplementedError


def read_label(value: object) -> int | Reason:
    """The class that a value found in a label's place names, or why it names none."""
    if value is None:
        return Reason("no label")
    if isinstance(value, Reason):
        return value
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        return Reason(f"the label {str(value)[:20]!r} is not a whole number")
    if not 0 <= value < MAX_CLASSES:
        return Reason(f"the label {value} is out of range (0 to {MAX_CLASSES - 1})")
    return int(value)
