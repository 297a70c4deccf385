"""Per-sample noise: a sample is a function of its seed alone, never of the batch, shard, rank or device it is computed in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def noise_for_seeds(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [n, *shape], float32 on the CPU, one generator per seed (EDM's convention: seed mod 2^32)."""
    return noise_and_labels(seeds, shape, 0)[0]


def noise_and_labels(seeds: Iterable[int], shape: Sequence[int], classes: int) -> tuple[Tensor, Tensor]:
    """Noise [n, *shape] and, drawn after it from the same generator as EDM does, uniform class indices [n] int64 (zeros if classes is 0)."""
    seeds = list(seeds)
    noise = torch.empty(len(seeds), *shape)
    labels = torch.zeros(len(seeds), dtype=torch.int64)
    generator = torch.Generator()
    for i, seed in enumerate(seeds):
        generator.manual_seed(seed % 2**32)
        torch.randn(shape, generator=generator, out=noise[i])
        if classes:
            labels[i] = torch.randint(classes, (), generator=generator)
    return noise, labels
