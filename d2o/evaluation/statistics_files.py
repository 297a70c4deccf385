"""Feature statistics as files: own npz files that say what made them, and the files of all the tools
that publish any.

Read are, by what is in them and not by their suffix: npz with mu and sigma (EDM, pytorch-fid, clean-fid; ADM's
reference batches also have mu_s and sigma_s, for sFID) or with `feats`, the features themselves (clean-fid's KID);
pickles of EDM2 ({num_images, fid: {mu, sigma},
fd_dinov2: {mu, sigma}}) and of StyleGAN's cache; `.npy` of a dict (DD-GAN); torch-fidelity's cached `.pt`. Nothing in
them is ever executed.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.evaluation.statistics import Statistics
from d2o.inputs import JsonObject, check_input
from d2o.interop.npz import npz_names, read_npz
from d2o.interop.numpy_pickle import pickled_keys, read_pickled
from d2o.interop.safetensors_io import atomic_write
from d2o.metrics.frechet import Moments

EDM2 = {"fid": "inception", "fd_dinov2": "dinov2_vitl14"}
"""What EDM2's files call the statistics of which extractor."""
ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "feats", "features")
TEXTS = ("feature", "resize", "extractor_resize", "weights_sha256", "tool_version")
SYMMETRY = 1e-6
"""Largest |sigma - sigma^T|, relative to the largest entry, that rounding in any tool explains (float32 sums give
1e-7)."""
EXPECTED = "expected an .npz with arrays mu [d] and sigma [d, d], or what EDM2, StyleGAN, DD-GAN or torch-fidelity save"


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Write d2o's npz {mu, sigma, n, feature, resize, extractor_resize, weights_sha256, tool_version}, with mu_s and
    sigma_s where there are spatial statistics and `features` where there are those (atomically; equal content gives
    equal bytes)."""
    arrays = {"mu": statistics.mu.numpy(), "sigma": statistics.sigma.numpy(), "n": np.int64(statistics.n or 0)}
    arrays |= {key: np.str_(getattr(statistics, key)) for key in TEXTS}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mu.numpy(), "sigma_s": statistics.spatial.sigma.numpy()}
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def is_statistics(path: str | Path) -> bool:
    """Whether a file holds statistics that `load_statistics` reads, and no images: the evaluation batches of
    guided-diffusion hold both and are images here, though `load_statistics` takes their statistics. False for what
    cannot be read at all."""
    path = Path(path)
    names = set(npz_names(path))
    if names:
        return "arr_0" not in names and ({"mu", "sigma"} <= names or "feats" in names)
    found = pickled_keys(path) if path.is_file() else set()
    return {"mu", "sigma"} <= found or bool(found & EDM2.keys()) or {"raw_mean", "raw_cov"} <= found


def holds_statistics(path: str | Path) -> bool:
    """Whether it is one of ADM's evaluation batches: images, and the statistics (of a larger set) that FID compares
    with."""
    path = Path(path)
    return {"arr_0", "mu", "sigma"} <= set(npz_names(path))


def load_statistics(path: str | Path, feature: str | None = None) -> Statistics:
    """Statistics of any of the files above. `feature`: the extractor that they are wanted for, which matters where a
    file has several (EDM2's;
    None: its first, Inception's); whether they are that extractor's is for `check_same_features` to say.

    UserError: missing, damaged or truncated; a pickle of anything but numbers; no mu and sigma, or not of one shape; a
    covariance that is not finite, not symmetric or has negative variances; no statistics of `feature` among several.
    """
    path = Path(path)
    check_input(path, "a file of statistics")
    record = _pick(path, _read(path), feature)
    about: JsonObject = {key: str(record[key]) for key in TEXTS if key in record}
    count = next((record[key] for key in ("n", "num_images", "num_items") if key in record), 0)
    n = int(count) if isinstance(count, int | np.integer | np.ndarray) and np.size(count) == 1 else 0
    features = next((_features(path, record[key]) for key in ("features", "feats") if key in record), None)
    if {"mu", "sigma"} <= set(record):
        mu, sigma = _gaussian(path, record, "mu", "sigma")
    elif features is not None:
        n = len(features)
        mu, sigma = _of_features(features)
    else:
        raise UserError(
            f"{path} holds {', '.join(sorted(map(str, record))) or 'nothing'}; statistics need mu and sigma", EXPECTED
        )
    spatial = (
        Statistics(*_gaussian(path, record, "mu_s", "sigma_s"), n or None, **about)
        if {"mu_s", "sigma_s"} <= set(record)
        else None
    )
    return Statistics(mu, sigma, n or None, **about, features=features, spatial=spatial)


def _read(path: Path) -> JsonObject:
    """The dict that the file is. Of an npz only what statistics are made of is read; the rest is there by name."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    archive = start.startswith(b"PK") and (bool(npz_names(path)) or not _is_zip(path))
    if not archive and not start.startswith((b"PK", b"\x80", b"\x93NUMPY")):
        raise UserError(f"{path} cannot be read as statistics: it is neither an npz nor a pickle", EXPECTED)
    if not archive:
        found = read_pickled(path)
        if not isinstance(found, dict):
            raise UserError(f"{path} holds a {type(found).__name__}, not a dict of mu and sigma", EXPECTED)
        return found
    try:
        return {**dict.fromkeys(npz_names(path)), **read_npz(path, lambda name: name in (*ARRAYS, *TEXTS, "n"))}
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read as statistics ({error})",
            f"{EXPECTED}; a truncated file is smaller than its original",
        ) from error


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # newer versions of Python say so of some
        return False


def _pick(path: Path, record: JsonObject, feature: str | None) -> JsonObject:
    """The statistics in a record that holds those of several extractors, or sums of which they are made."""
    if {"raw_mean", "raw_cov", "num_items"} <= set(record):
        return _of_sums(path, record)
    several = [key for key in EDM2 if isinstance(record.get(key), dict)]
    if not several:
        return record
    key = (
        several[0]
        if feature is None
        else next((key for key in several if feature.startswith(EDM2[key].partition("_")[0])), None)
    )
    if key is None:
        has = " and ".join(EDM2[key] for key in several)
        raise UserError(f"{path} holds statistics of {has}, none of {feature}", f"give --extractor {EDM2[several[0]]}")
    return {**record[key], "num_images": record.get("num_images", 0), "feature": EDM2[key]}


def _of_sums(path: Path, record: JsonObject) -> JsonObject:
    """StyleGAN's cache: sums of the features and of their outer products. Its covariance is divided by n, and stays
    so."""
    try:
        n = int(record["num_items"])
        if n < 1:
            raise ValueError(f"of {n} images")
        mean = np.asarray(record["raw_mean"], np.float64) / n
        found = {
            "mu": mean,
            "sigma": np.asarray(record["raw_cov"], np.float64) / n - np.outer(mean, mean),
            "num_items": n,
        }
        if record.get("all_features"):
            found["features"] = np.concatenate(record["all_features"])[:n]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} has the keys of StyleGAN's statistics, but not their values ({error})", EXPECTED
        ) from error
    return found


def _gaussian(path: Path, record: JsonObject, *names: str) -> tuple[Tensor, Tensor]:
    """A mean and a covariance, checked."""
    mu, sigma = (torch.from_numpy(_numbers(path, name, record[name], np.float64)) for name in names)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise UserError(
            f"{path}: {names[0]} has shape {tuple(mu.shape)}, {names[1]} {tuple(sigma.shape)}; expected [d] and [d, d]"
        )
    if not bool(torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        raise UserError(
            f"{path}: {names[0]} or {names[1]} holds values that are not finite", "make the statistics again"
        )
    largest = float(sigma.abs().max())
    if float((sigma - sigma.T).abs().max()) > SYMMETRY * largest:
        raise UserError(f"{path}: {names[1]} is not symmetric, so it is no covariance", "make the statistics again")
    if float(sigma.diagonal().min()) < -SYMMETRY * largest:
        raise UserError(
            f"{path}: {names[1]} has negative variances, so it is no covariance", "make the statistics again"
        )
    return mu, sigma


def _features(path: Path, value: object) -> Tensor:
    features = torch.from_numpy(_numbers(path, "features", value, np.float32))
    if features.ndim != 2 or len(features) < 2 or not bool(torch.isfinite(features).all()):
        raise UserError(
            f"{path}: features of shape {tuple(features.shape)}; expected [n, d] of finite values, n at least 2"
        )
    return features


def _numbers(path: Path, name: str, value: object, dtype: type) -> np.ndarray:
    try:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
            raise TypeError(f"a {getattr(value, 'dtype', type(value).__name__)}")
        return np.array(value, dtype)  # a copy that may be written to
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {name} is not an array of real numbers ({error})", EXPECTED) from error


def _of_features(features: Tensor) -> tuple[Tensor, Tensor]:
    stream = Moments(features.shape[1])
    for block in features.split(4096):
        stream.update(block)
    return stream.mean, stream.cov
