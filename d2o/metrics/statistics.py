"""Feature statistics as a value and as a file: own npz files that say what made them, and the bare mu/sigma files of other tools."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2o import __version__
from d2o.errors import UserError
from d2o.interop.safetensors_io import atomic_write
from d2o.metrics.features import Extractor
from d2o.metrics.frechet import FeatureStatistics, frechet_distance


@dataclass(frozen=True)
class Statistics:
    """Mean [d] and covariance [d, d] (float64) of the features of `n` images. None or "" where a foreign file doesn't say."""

    mu: Tensor
    sigma: Tensor
    n: int | None = None
    feature: str = ""
    resize: str = ""
    weights_sha256: str = ""
    tool_version: str = ""

    @property
    def dim(self) -> int:
        return len(self.mu)

    @classmethod
    def of(cls, stream: FeatureStatistics, extractor: Extractor, resize: str = "none") -> Statistics:
        return cls(stream.mean, stream.cov, stream.n, extractor.name, resize, extractor.sha256, __version__)

    @classmethod
    def none(cls, extractor: Extractor) -> Statistics:
        """Of no images at all: only tells the extractor, for comparing."""
        return cls(torch.zeros(extractor.dim), torch.zeros(0), 0, extractor.name, "", extractor.sha256)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few images for the covariance to have full rank."""
        return self.n is not None and self.n <= self.dim

    def distance(self, other: Statistics) -> float:
        """The Fréchet distance to `other`. UserError unless both come from the same extractor."""
        check_same_features(self, other)
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma)


def check_same_features(a: Statistics, b: Statistics) -> None:
    """UserError for another dimension, other weights or, where a file names no weights, an extractor of another name."""
    if a.dim != b.dim:
        raise UserError(
            f"statistics of {a.dim} features ({a.feature or 'extractor not stated'}) cannot be compared with {b.dim} features "
            f"({b.feature or 'extractor not stated'})",
            "make both with the same --extractor",
        )
    if a.weights_sha256 and b.weights_sha256:
        if a.weights_sha256 != b.weights_sha256:
            raise UserError(
                f"statistics of another extractor: {a.feature} with weights {a.weights_sha256[:12]}, {b.feature} with weights "
                f"{b.weights_sha256[:12]}",
                "make both with the same --extractor (its weights are compared by sha256)",
            )
    elif a.feature and b.feature and a.feature != b.feature:
        raise UserError(f"statistics of another extractor: {a.feature} and {b.feature}", "make both with the same --extractor")


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write d2o's npz {mu, sigma, n, feature, resize, weights_sha256, tool_version} (atomically; equal content gives equal bytes)."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=statistics.mu.numpy(),
        sigma=statistics.sigma.numpy(),
        n=np.int64(statistics.n or 0),
        feature=np.str_(statistics.feature),
        resize=np.str_(statistics.resize),
        weights_sha256=np.str_(statistics.weights_sha256),
        tool_version=np.str_(statistics.tool_version),
    )
    atomic_write(path, buffer.getvalue())


def is_statistics(path: str | Path) -> bool:
    """Whether an npz file holds mu and sigma and no images (evaluation batches of guided-diffusion hold both: they are images here)."""
    try:
        with zipfile.ZipFile(path) as file:
            names = set(file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
    return {"mu.npy", "sigma.npy"} <= names and "arr_0.npy" not in names


def load_statistics(path: str | Path) -> Statistics:
    """Statistics from an npz with mu and sigma: d2o's own, or pytorch-fid's, clean-fid's, EDM's. UserError: missing, damaged or pickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            record: dict[str, Any] = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} cannot be read as statistics ({error})", "expected an .npz with arrays mu [d] and sigma [d, d]") from error
    if not {"mu", "sigma"} <= set(record):
        raise UserError(f"{path} holds {', '.join(sorted(record)) or 'nothing'}; statistics need mu and sigma")
    mu, sigma = (torch.as_tensor(np.asarray(record[key], dtype=np.float64)) for key in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu has shape {tuple(mu.shape)}, sigma {tuple(sigma.shape)}; expected [d] and [d, d]")
    n = int(record["n"]) if "n" in record else 0
    text = {key: str(record[key]) for key in ("feature", "resize", "weights_sha256", "tool_version") if key in record}
    return Statistics(mu, sigma, n or None, **text)
