"""Per-sample noise: a sample is a function of its seed alone, never of the batch, shard, rank or device it is computed
in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def noise_for_seeds(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [n, *shape], float32 on the CPU, one generator per seed (EDM's convention: seed mod
    2^32)."""
    return noise_and_labels(seeds, shape, 0)[0]


def noise_and_labels(seeds: Iterable[int], shape: Sequence[int], classes: int) -> tuple[Tensor, Tensor]:
    """Noise [n, *shape] and, drawn after it from the same generator as EDM does, uniform class indices [n] int64 (zeros
    if classes is 0)."""
    seeds = list(seeds)
    noise = torch.empty(len(seeds), *shape)
    labels = torch.zeros(len(seeds), dtype=torch.int64)
    generator = torch.Generator()
    for i, (seed, row) in enumerate(zip(seeds, noise.unbind(0))):
        generator.manual_seed(seed % 2**32)
        row.normal_(generator=generator)
        if classes:
            labels[i] = torch.randint(classes, (), generator=generator)
    return noise, labels


class StepNoise:
    """Fresh noise for the steps of a stochastic solver, float64 [n, *shape]: every sample's own generator goes on after
    the start noise (and, with `classes`, after the label), as EDM's sampler does. Calling it draws the next."""

    def __init__(self, seeds: Iterable[int], shape: Sequence[int], classes: int = 0):
        self.shape = tuple(shape)
        self.generators = [torch.Generator().manual_seed(seed % 2**32) for seed in seeds]
        for generator in self.generators:
            torch.randn(self.shape, generator=generator)
            if classes:
                torch.randint(classes, (), generator=generator)

    def __call__(self) -> Tensor:
        draws = [torch.randn(self.shape, generator=generator, dtype=torch.float64) for generator in self.generators]
        return torch.stack(draws) if draws else torch.empty(0, *self.shape, dtype=torch.float64)
