"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020): how much two sets of
features overlap, judged by balls about each point that reach to its k-th nearest other point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from d2o.errors import UserError, unknown
from d2o.metrics.distances import (
    DTYPES,
    Points,
    centre_of,
    exact_pairs,
    nearest_in,
    row_blocks,
    slack,
    squared,
    work_type,
)


@dataclass(frozen=True)
class Manifold:
    """Shares in [0, 1], but for the density, which may exceed 1. NaN: not asked for."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class _Rule:
    """Balls of squared radius `radius` (float64) about the reals (else about the fakes); `inclusive`: their surface
    belongs to them."""

    radius: Tensor
    about_real: bool
    inclusive: bool


def manifold(
    real: Tensor,
    fake: Tensor,
    k_pr: int | None = 3,
    k_dc: int | None = 5,
    *,
    dtype: str = "float32",
    inclusive_pr: bool = True,
    inclusive_dc: bool = False,
) -> Manifold:
    """All four at once, each distance computed once, for features real [n, d] and fake [m, d] on one device. `k_pr` or
    `k_dc` None: leave out precision and recall, or density and coverage.

    precision: share of fakes in a ball about a real (k-th nearest other real, k = k_pr); recall: the same, roles
    swapped. density: balls about reals (k_dc) that each fake lies in, on average, over k_dc; coverage: share of reals
    whose ball (k_dc) holds a fake. `inclusive`: distance <= radius (StyleGAN2, guided-diffusion, torch-fidelity), else
    < (prdc). `dtype`: what features are rounded to first; float16 is how SiD and guided-diffusion keep them. The result
    is that of float64 arithmetic; memory holds blocks of 2048 x 2048 distances, no n x m matrix.
    UserError: no more than k images in a set, features that are not finite, different dimensions, unknown dtype.
    """
    kind = _dtype(dtype)
    _check(real, fake, "the real images", "the generated images")
    for what, k, sets in (("precision and recall", k_pr, (real, fake)), ("density and coverage", k_dc, (real,))):
        if k is not None:
            _check_k(what, k, sets)
    centre = centre_of(real, kind)
    r, f = Points(real, kind, centre, "the real images"), Points(fake, kind, centre, "the generated images")
    work = work_type(r, f)
    rules = {}
    from_real = nearest_in(r, r, max(k_pr or 1, k_dc or 1), work)[0]
    if k_pr:
        rules["precision"] = _Rule(from_real[:, k_pr - 1].contiguous(), True, inclusive_pr)
        rules["recall"] = _Rule(nearest_in(f, f, k_pr, work)[0][:, -1].contiguous(), False, inclusive_pr)
    if k_dc:
        rules["density"] = _Rule(from_real[:, k_dc - 1].contiguous(), True, inclusive_dc)
    hit_real = {name: torch.zeros(r.n, dtype=torch.bool, device=real.device) for name in rules}
    hit_fake = {name: torch.zeros(f.n, dtype=torch.bool, device=real.device) for name in rules}
    count = 0
    for rows in row_blocks(r.n):
        for columns in row_blocks(f.n):
            for name, (i, j) in _inside(r, rows, f, columns, rules, work).items():
                hit_real[name][i] = True
                hit_fake[name][j] = True
                count += len(i) if name == "density" else 0
    return Manifold(
        _share(hit_fake["precision"]) if k_pr else math.nan,
        _share(hit_real["recall"]) if k_pr else math.nan,
        count / (k_dc * f.n) if k_dc else math.nan,
        _share(hit_real["density"]) if k_dc else math.nan,
    )


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, dtype: str = "float32", inclusive: bool = True
) -> tuple[float, float]:
    """(precision, recall) of `manifold`: Kynkäänniemi et al. 2019, equations 1 and 2. UserError as there."""
    found = manifold(real, fake, k, None, dtype=dtype, inclusive_pr=inclusive)
    return found.precision, found.recall


def density_coverage(
    real: Tensor, fake: Tensor, k: int = 5, inclusive: bool = False, dtype: str = "float32"
) -> tuple[float, float]:
    """(density, coverage) of `manifold`: Naeem et al. 2020, equations 5 and 6. UserError as there."""
    found = manifold(real, fake, None, k, dtype=dtype, inclusive_dc=inclusive)
    return found.density, found.coverage


def nearest_rows(queries: Tensor, base: Tensor, k: int = 1, dtype: str = "float32") -> tuple[Tensor, Tensor]:
    """The k nearest features of `base` [n, d] to each of `queries` [m, d] (a generated image's nearest training
    images): Euclidean distances [m, k] float64, ascending, and indices [m, k] into `base`. Exact, in blocks.

    UserError: fewer than k features, features that are not finite, different dimensions, unknown dtype.
    """
    kind = _dtype(dtype)
    _check(base, queries, "the base", "the queries")
    if not 1 <= k <= len(base):
        raise UserError(f"the {k} nearest of {len(base)} images")
    centre = centre_of(base, kind)
    q, b = Points(queries, kind, centre, "the queries"), Points(base, kind, centre, "the base")
    squares, indices = nearest_in(q, b, k, work_type(q, b))
    return squares.sqrt(), indices


def _inside(
    r: Points, rows: slice, f: Points, columns: slice, rules: dict[str, _Rule], work: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """Which pairs of a block are closer than each rule's radius: {rule: (indices into the reals, indices into the
    fakes)}."""
    d = squared(r, rows, f, columns, work)
    error = slack(r.dim, work)
    x, y = r.norms[rows], f.norms[columns]
    # Few pairs lie within any ball, so first all that may, with room for the error; only these are looked at closely.
    near = torch.zeros_like(d, dtype=torch.bool)
    for about_real in (True, False):
        radii = [
            rule.radius[rows if about_real else columns] for rule in rules.values() if rule.about_real == about_real
        ]
        if radii:
            room = (x + y.max() if about_real else y + x.max()).square() * (
                1.25 * error
            )  # a little more: it is rounded, too
            reach = (torch.stack(radii).amax(0) + room).to(work)
            near |= d <= (reach[:, None] if about_real else reach)
    i, j = near.nonzero(as_tuple=True)
    value, room = d[i, j].double(), error * (x[i] + y[j]).square()
    i, j = i + rows.start, j + columns.start
    radius = {name: rule.radius[i if rule.about_real else j] for name, rule in rules.items()}
    open_ = torch.zeros_like(i, dtype=torch.bool)
    for name in rules:
        open_ |= (value - radius[name]).abs() <= room
    count = int(open_.sum())
    if (
        count > 4096 + d.numel() // 64
    ):  # degenerate: a cloud too tight for its place; the product in float64 tells most of it apart
        if work != torch.float64:
            return _inside(r, rows, f, columns, rules, torch.float64)
    elif count:
        value[open_] = exact_pairs(r, i[open_], f, j[open_])
    found = {}
    for name, rule in rules.items():
        within = value <= radius[name] if rule.inclusive else value < radius[name]
        found[name] = (i[within], j[within])
    return found


def _share(hit: Tensor) -> float:
    return int(hit.sum()) / len(hit)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise unknown("dtype of features", name, DTYPES)
    return DTYPES[name]


def _check_k(what: str, k: int, sets: tuple[Tensor, ...]) -> None:
    n = min(len(x) for x in sets)
    if k < 1:
        raise UserError(f"{what} of the {k}-th nearest neighbour: k must be at least 1")
    if n <= k:
        raise UserError(
            f"{what} with k = {k} need more than {k} images in each set; one holds {n}",
            "give more images, or a smaller k",
        )


def _check(a: Tensor, b: Tensor, what_a: str, what_b: str) -> None:
    for x, what in ((a, what_a), (b, what_b)):
        if x.ndim != 2 or not x.numel():
            raise UserError(f"the features of {what} have the shape {tuple(x.shape)}; expected [n, d]")
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"{what_a} have {a.shape[1]} features, {what_b} {b.shape[1]}",
            "both must come from the same feature extractor",
        )
