"""The nearest training images of generated ones: does the generator repeat what it was trained on?

A distance to the training set alone says little, because its scale is the extractor's. It is read beside the same
distance between training
images: a generator that learned the distribution makes images about as far from their nearest training image as
training images are from each other (Meehan, Chaudhuri and Dasgupta, "A Non-Parametric Test to Detect Data-Copying in
Generative Models", 2020, compare the same two distributions); one that copies makes nearer ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from d2o.data.pictures import to_png
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.metrics.prdc import nearest_rows

REAL_QUERIES = 2000  # training images whose own nearest neighbour is looked up: enough for a median
TILE = 128  # pixels of a picture at most
QUANTILES = 20
NEAR = 0.5  # of the typical distance among training images: nearer is suspicious


def neighbours_record(
    samples: Tensor,
    sample_features: Tensor,
    reference_features: Tensor,
    reference_images: Callable[[list[int]], Tensor],
    k: int = 3,
    rows: int = 16,
    extractor: str = "",
) -> JsonObject:
    """What `record["neighbours"]` holds, JSON-able.

    `samples` uint8 [n, C, H, W], `sample_features` [n, d], `reference_features` [m, d]; `reference_images(indices)` ->
    uint8 [len, C, H, W].
    `rows` of pictures are kept: half of evenly spaced samples, not chosen, half of the samples nearest to the
    reference, each row a sample and its `k` nearest reference images. Distances are Euclidean. UserError: fewer than k
    + 1 reference images, features that are not finite.

    n, n_ref, k, extractor   what was searched
    columns                  of the pictures: k + 1
    spaced, closest          {"png": base64, "samples": [i], "neighbours": [[j]], "distances": [[...]]}, one entry a row
    median, median_real      of the distance to the nearest training image: of samples, of training images (to another
    one) near                     0.5
    closer, closer_real      share of each that is nearer than `near` times median_real
    curve                    {"sample": [...], "real": [...]}: quantiles 0, 1/20, ..., 1 of these distances, in units of
    median_real
    """
    if not len(samples) == len(sample_features) > 0:
        raise ValueError(f"{len(samples)} samples, {len(sample_features)} rows of features")
    m = len(reference_features)
    if m < k + 1:
        raise UserError(
            f"{k} nearest training images need at least {k + 1} reference images, not {m}",
            "give a larger reference, or a smaller k",
        )
    distances, indices = (t.cpu() for t in nearest_rows(sample_features, reference_features, k))
    own, real = distances[:, 0].double(), _among_reference(reference_features)
    median_real = float(real.median())
    scale = median_real or 1.0
    half = max(rows // 2, 1)
    spaced = torch.linspace(0, len(samples) - 1, min(half, len(samples))).long()
    closest = torch.argsort(own, stable=True)[:half]

    def sheet(chosen: Tensor) -> JsonObject:
        return {
            "png": _sheet(samples[chosen], reference_images(indices[chosen].flatten().tolist()), k),
            "samples": chosen.tolist(),
            "neighbours": indices[chosen].tolist(),
            "distances": distances[chosen].double().tolist(),
        }

    return {
        "extractor": extractor,
        "n": len(samples),
        "n_ref": m,
        "k": k,
        "columns": k + 1,
        "near": NEAR,
        "spaced": sheet(spaced),
        "closest": sheet(closest),
        "median": float(own.median()),
        "median_real": median_real,
        "closer": float((own < NEAR * median_real).double().mean()),
        "closer_real": float((real < NEAR * median_real).double().mean()),
        "curve": {"sample": _quantiles(own / scale), "real": _quantiles(real / scale)},
    }


def _among_reference(features: Tensor) -> Tensor:
    """The distance of evenly spaced reference images to their nearest other one, float64."""
    chosen = torch.linspace(0, len(features) - 1, min(len(features), REAL_QUERIES)).long()
    distances, indices = (t.cpu() for t in nearest_rows(features[chosen.to(features.device)], features, 2))
    first_is_itself = indices[:, 0] == chosen  # not so where an exact double comes before it
    return torch.where(first_is_itself, distances[:, 1], distances[:, 0]).double()


def _quantiles(values: Tensor) -> list[float]:
    steps = torch.linspace(0, 1, QUANTILES + 1, dtype=torch.float64)
    return torch.quantile(values[:: max(1, len(values) // 1_000_000)], steps).tolist()  # torch takes at most 16 million


def _sheet(samples: Tensor, neighbours: Tensor, k: int) -> str:
    """Rows of a sample and its k neighbours, as one PNG."""
    side = min(TILE, *samples.shape[-2:])
    ours, theirs = _small(samples, side), _small(neighbours, side)
    channels = max(ours.shape[1], theirs.shape[1])
    ours, theirs = ours.expand(-1, channels, -1, -1), theirs.expand(-1, channels, -1, -1)
    rows = torch.cat([ours[:, None], theirs.reshape(len(ours), k, *ours.shape[1:])], 1)
    return to_png(rows.flatten(0, 1), k + 1)


def _small(images: Tensor, side: int) -> Tensor:
    """uint8 images of `side` x `side`; those that have this size stay as they are."""
    images = images.cpu()
    if tuple(images.shape[-2:]) == (side, side):
        return images
    return (
        F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )
