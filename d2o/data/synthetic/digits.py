"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes, read from the installed package."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np

SPLIT_SEED = 0


def digits(half: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [n, 8, 8], labels int64 [n]) of all digits, or of the half "a" (899) or "b" (898), in
    scikit-learn's order.

    Pixels 0..16 become round(v * 255 / 16). The halves are disjoint, cover the set and hold each class equally (to
    within one image): within a class a fixed permutation is dealt in turn to the two halves.
    """
    values = _table()
    images = np.round(values[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = values[:, -1].astype(np.int64)
    if half is None:
        return images, labels
    rows = np.sort(_halves(labels)["ab".index(half)])
    return images[rows], labels[rows]


@functools.cache
def _table() -> np.ndarray:
    """float64 [1797, 65], a row an image, its class last: scikit-learn's file, without an import of the package, which
    takes a second."""
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / "datasets" / "data" / "digits.csv.gz").is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits  # a version that keeps it elsewhere

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def _halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(SPLIT_SEED)  # the legacy generator: its stream is frozen for good by numpy's policy
    dealt = np.concatenate([random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)])
    return dealt[0::2], dealt[1::2]
