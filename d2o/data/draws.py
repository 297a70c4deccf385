"""What sample i starts from: its noise and its label, from its seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2o.data.order import mix
from d2o.diffusion.guidance import Range
from d2o.diffusion.noise import noise_and_labels
from d2o.errors import UserError

SEEDS = 2**32
"""Seeds are taken modulo this (EDM's convention), so more than this many samples would repeat."""


def label_mode(labels: str | None, classes: int, name: str) -> str:
    """The canonical form of a `--labels` option for a generator `name` with that many classes (0: takes no labels).

    "random" (or "uniform"): drawn from the sample's own seed, after the noise, as EDM does; "balanced": sample i gets
    class i mod classes;
    "3" or "0,1,2": these in turn. None means "random", or "none" without classes. UserError: anything else, a class out
    of range, labels for no classes.
    """
    text = "" if labels is None else labels.replace(" ", "").lower()
    if classes == 0:
        if text in ("", "none", "random", "uniform"):  # random: what recipes say by default
            return "none"
        raise UserError(f"{name!r} is unconditional; it takes no labels (given: {labels})", "leave --labels away")
    if text in ("", "random", "uniform", "balanced"):
        return "balanced" if text == "balanced" else "random"
    parts, hint = text.split(","), f"{name!r} has classes 0 to {classes - 1}"
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"labels {labels!r}: expected random, balanced, or class indices like 0,1,2", hint)
    for part in parts:
        if int(part) >= classes:
            raise UserError(f"labels {labels!r}: class {int(part)} is out of range", hint)
    return ",".join(str(int(part)) for part in parts)


def check_range(n: int, seed: int) -> None:
    """UserError unless samples seed .. seed + n - 1 exist and differ."""
    if n < 1:
        raise UserError(f"n must be at least 1, not {n}")
    if not 0 <= seed <= SEEDS - n:
        raise UserError(f"seed {seed}: seed and seed + n - 1 must lie between 0 and 2^32 - 1")


def draw(
    seed: int, start: int, n: int, shape: Sequence[int], classes: int, labels: str
) -> tuple[Tensor, Tensor | None]:
    """Samples start .. start + n - 1: noise [n, *shape] float32 and class indices [n] int64, or None if `labels` is
    "none" or "text".

    `labels` is in the form that `label_mode` returns. The noise is the same in every mode.
    """
    return draw_some(seed, range(start, start + n), shape, classes, labels)


def draw_some(
    seed: int, index: Sequence[int], shape: Sequence[int], classes: int, labels: str
) -> tuple[Tensor, Tensor | None]:
    """`draw` for samples of any numbers, in that order."""
    noise, drawn = noise_and_labels([seed + i for i in index], shape, classes if labels == "random" else 0)
    if labels in ("none", "text", "random"):
        return noise, drawn if labels == "random" else None
    cycle = torch.arange(classes) if labels == "balanced" else torch.tensor([int(part) for part in labels.split(",")])
    return noise, cycle[torch.as_tensor(index, dtype=torch.int64) % len(cycle)]


def draw_scales(seeds: Sequence[int], scales: Range) -> Tensor:
    """The guidance scale of the sample of each seed, [n] float32, uniform over the range: a function of the seed alone,
    and of nothing that the noise or the label is."""
    low, high = scales
    return torch.tensor([low + mix(seed, "guidance") / 2**63 * (high - low) for seed in seeds], dtype=torch.float32)
