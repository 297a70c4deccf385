"""Squared Euclidean distances between sets of features, block by block: fast in float32, and exact where the last
digits decide.

|x - y|^2 = |x|^2 + |y|^2 - 2 x.y costs one matrix product, but cancels: in float32 it is off by up to `slack` times
(|x| + |y|)^2, features being centred first. Whatever is closer than that to what it is compared with is computed again
from the differences, in float64, so results are those of float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from d2o.errors import UserError

DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
BLOCK = 2048  # rows and columns of a block of distances
SPARE = 2  # candidates beyond the k nearest that are kept, so that the order of the last ones can be settled
PAIRS = 512  # features, or pairs of them, that are in float64 at one time


class Points:
    """Features [n, d], rounded to `dtype` and centred about `centre` [d] (float64) as blocks are taken out of them;
    never copied as a whole."""

    def __init__(self, features: Tensor, dtype: torch.dtype, centre: Tensor, what: str):
        self.raw, self.dtype, self.centre = features.detach(), dtype, centre
        self.n, self.dim = features.shape
        parts = [self.exact(part).sub_(centre).square_().sum(1) for part in row_blocks(self.n, PAIRS)]
        self.norms = torch.cat(parts).sqrt()  # float64
        if not bool(torch.isfinite(self.norms).all()):
            fix = (
                "take --pr-dtype float32"
                if dtype == torch.float16
                else "the extractor's weights or the images are damaged"
            )
            raise UserError(
                f"the features of {what} hold values that are not finite"
                + (" in float16" if dtype == torch.float16 else ""),
                fix,
            )

    def exact(self, rows: slice | Tensor) -> Tensor:
        """A copy of rows [k, d] in float64, rounded to `dtype` but not centred."""
        return self.raw[rows].to(self.dtype).to(torch.float64, copy=True)

    def centred(self, rows: slice | Tensor, work: torch.dtype) -> Tensor:
        return self.raw[rows].to(self.dtype).to(work) - self.centre.to(work)


def centre_of(features: Tensor, dtype: torch.dtype) -> Tensor:
    """About the mean [d] of features rounded to `dtype`: float64, but of float32's values, so that float32 blocks are
    centred about the same."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in row_blocks(len(features), PAIRS):
        total += features.detach()[part].to(dtype).to(torch.float64).sum(0)
    return (total / len(features)).to(torch.float32).to(torch.float64)


def row_blocks(n: int, size: int | None = None) -> Iterator[slice]:
    size = size or BLOCK
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def work_type(*points: Points) -> torch.dtype:
    """float32, unless the features need more: they are in float64, their squares leave float32's range, or its products
    have been made coarse."""
    largest = max(float(p.norms.max()) for p in points)
    fine = torch.get_float32_matmul_precision() == "highest" and (largest == 0 or 1e-12 < largest < 1e16)
    return torch.float32 if fine and all(p.dtype != torch.float64 for p in points) else torch.float64


def slack(dim: int, work: torch.dtype) -> float:
    """The error of `squared` is at most this times (|x| + |y|)^2: d/2 roundings of the product, in whatever order it
    sums; one of each centred feature, and one of each norm and sum."""
    return (dim / 2 + 8) * torch.finfo(work).eps / 2


def squared(a: Points, rows: slice | Tensor, b: Points, columns: slice, work: torch.dtype) -> Tensor:
    """Squared distances [rows, columns], within `slack`; may fall a little below 0."""
    d = torch.mm(a.centred(rows, work), b.centred(columns, work).T)
    d *= -2
    d += a.norms[rows].square().to(work)[:, None]
    d += b.norms[columns].square().to(work)
    return d


def exact_pairs(a: Points, i: Tensor, b: Points, j: Tensor) -> Tensor:
    """Squared distances [p] in float64 of the pairs (i, j), from differences: 0 for equal features."""
    parts = [b.exact(q).sub_(a.exact(p)).square_().sum(1) for p, q in zip(i.split(PAIRS), j.split(PAIRS), strict=True)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=i.device)


class Nearest:
    """The `keep` smallest squared distances of each row seen so far, and the columns that they belong to, in no
    order."""

    def __init__(self, n: int, keep: int, work: torch.dtype, device: torch.device):
        self.values = torch.full((n, keep), float("inf"), dtype=work, device=device)
        self.columns = torch.zeros(n, keep, dtype=torch.int64, device=device)

    def add(self, rows: slice, d: Tensor, first: int) -> None:
        """Distances d [rows, c] to the columns first, first + 1, ..."""
        keep = self.values.shape[1]
        values, columns = d.topk(min(keep, d.shape[1]), dim=1, largest=False, sorted=False)
        values = torch.cat([self.values[rows], values], 1)
        columns = torch.cat([self.columns[rows], columns + first], 1)
        self.values[rows], best = values.topk(keep, dim=1, largest=False, sorted=False)
        self.columns[rows] = columns.gather(1, best)


def nearest_in(a: Points, b: Points, k: int, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k nearest points of `b` to each of `a`: squared distances [n, k] float64, exact and ascending, and their
    indices [n, k]. Where `b` is `a`, the point itself does not count."""
    same = b is a
    keep = min(k + SPARE, b.n - same)
    near = Nearest(a.n, keep, work, a.raw.device)
    for rows in row_blocks(a.n):
        for columns in row_blocks(b.n):
            if same and columns.start < rows.start:
                continue  # the same distances as on the other side of the diagonal
            d = squared(a, rows, b, columns, work)
            if same and rows == columns:
                d.fill_diagonal_(float("inf"))
            near.add(rows, d, columns.start)
            if same and rows != columns:
                near.add(columns, d.T.contiguous(), rows.start)
    distances, indices, sure = _settle(a, b, near, k, complete=keep == b.n - same)
    # Where float32 leaves open which points are the nearest, look again in float64; with fully equal features there is
    # nothing to look for.
    for rows in (~sure & (distances[:, -1] > 0)).nonzero().flatten().split(BLOCK):
        again = Nearest(len(rows), keep, torch.float64, a.raw.device)
        for columns in row_blocks(b.n):
            d = squared(a, rows, b, columns, torch.float64)
            if same:
                inside = ((rows >= columns.start) & (rows < columns.stop)).nonzero().flatten()
                d[inside, rows[inside] - columns.start] = float("inf")
            again.add(slice(None), d, columns.start)
        distances[rows], indices[rows], _ = _settle(a, b, again, k, complete=True, rows=rows)
    return distances, indices


def _settle(
    a: Points, b: Points, near: Nearest, k: int, complete: bool, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k nearest of the candidates, by exact distance (and index, where that is equal), and whether no other point
    can be nearer. `rows`: which points of `a` the candidates are of (all); `complete`: there are no other points."""
    rows = torch.arange(a.n, device=a.raw.device) if rows is None else rows
    distances = torch.empty(len(rows), k, dtype=torch.float64, device=rows.device)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    keep = near.columns.shape[1]
    columns = near.columns.sort(dim=1).values
    for part in row_blocks(len(rows), max(PAIRS // keep, 1)):
        d = b.exact(columns[part]).sub_(a.exact(rows[part])[:, None]).square_().sum(2)
        best = d.argsort(dim=1, stable=True)[:, :k]
        distances[part], indices[part] = d.gather(1, best), columns[part].gather(1, best)
    others = near.values.max(1).values.double()  # every other point was found at least this far away
    error = slack(a.dim, near.values.dtype) * (a.norms[rows] + b.norms.max()).square()
    sure = torch.ones_like(others, dtype=torch.bool) if complete else distances[:, -1] <= others - error
    return distances, indices, sure
