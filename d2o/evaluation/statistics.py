"""Feature statistics as a value: mean and covariance, and what made them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.features.extractor import Extractor
from d2o.metrics.frechet import Moments, frechet_distance
from d2o.version import __version__


@dataclass(frozen=True)
class Statistics:
    """Mean [d] and covariance [d, d] (float64) of the features of `n` images. None or "" where a foreign file doesn't
    say.

    `resize`: what was done to the images in all, `extractor_resize`: by the extractor alone. `features` [n, d] float32:
    of every image, where
    the file has them. `spatial`: the same of the extractor's spatial features (for sFID).
    """

    mu: Tensor
    sigma: Tensor
    n: int | None = None
    feature: str = ""
    resize: str = ""
    weights_sha256: str = ""
    tool_version: str = ""
    extractor_resize: str = ""
    features: Tensor | None = None
    spatial: Statistics | None = None

    @property
    def dim(self) -> int:
        return len(self.mu)

    @classmethod
    def of(
        cls,
        stream: Moments,
        extractor: Extractor,
        resize: str = "none",
        spatial: Moments | None = None,
    ) -> Statistics:
        about = (stream.n, extractor.name, resize, extractor.sha256, __version__, extractor.resize)
        other = None if spatial is None else cls(spatial.mean, spatial.cov, *about)
        return cls(stream.mean, stream.cov, *about, spatial=other)

    @classmethod
    def none(cls, extractor: Extractor) -> Statistics:
        """Of no images at all: only tells the extractor, for comparing."""
        return cls(
            torch.zeros(extractor.dim),
            torch.zeros(0),
            0,
            extractor.name,
            "",
            extractor.sha256,
            extractor_resize=extractor.resize,
        )

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few images for the covariance to have full rank."""
        return self.n is not None and self.n <= self.dim

    def distance(self, other: Statistics) -> float:
        """The Fréchet distance to `other`. UserError unless both come from the same extractor."""
        check_same_features(self, other)
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma)


def check_same_features(a: Statistics, b: Statistics) -> None:
    """UserError for another dimension, other weights, another way of resizing or, where a file names no weights, an
    extractor of another name.

    The two ways of feeding one network (inception and inception-clean) differ by whole points of FID, so equal weights
    are not enough.
    """
    names = [name for name in dict.fromkeys((a.feature, b.feature)) if name]
    hint = "make both with the same --extractor" + (f": {' or '.join(names)}" if names else "")
    if a.dim != b.dim:
        raise UserError(
            f"statistics of {a.dim} features ({a.feature or 'extractor not stated'}) cannot be compared with {b.dim}"
            f" features ({b.feature or 'extractor not stated'})",
            hint,
        )
    if a.weights_sha256 and b.weights_sha256:
        if a.weights_sha256 != b.weights_sha256:
            raise UserError(
                f"statistics of another extractor: {a.feature} with weights {a.weights_sha256[:12]}, {b.feature} with"
                f" weights {b.weights_sha256[:12]}",
                f"{hint} (its weights are compared by sha256)",
            )
    elif a.feature and b.feature and a.feature != b.feature:
        raise UserError(f"statistics of another extractor: {a.feature} and {b.feature}", hint)
    if a.extractor_resize and b.extractor_resize and a.extractor_resize != b.extractor_resize:
        raise UserError(
            f"statistics of images resized in another way: {a.feature or 'one'} resizes with {a.extractor_resize}, "
            f"{b.feature or 'the other'} with {b.extractor_resize}",
            hint,
        )
