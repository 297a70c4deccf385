"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes, read from the installed package."""

from __future__ import annotations

import numpy as np

SPLIT_SEED = 0


def digits(half: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [n, 8, 8], labels int64 [n]) of all digits, or of the half "a" (899) or "b" (898), in
    scikit-learn's order.

    Pixels 0..16 become round(v * 255 / 16). The halves are disjoint, cover the set and hold each class equally (to
    within one image): within a class a fixed permutation is dealt in turn to the two halves.
    """
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    if half is None:
        return images, labels
    rows = np.sort(_halves(labels)["ab".index(half)])
    return images[rows], labels[rows]


def _halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(SPLIT_SEED)  # the legacy generator: its stream is frozen for good by numpy's policy
    dealt = np.concatenate([random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)])
    return dealt[0::2], dealt[1::2]
