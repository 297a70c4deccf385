"""Batches as a pure function of (seed, iteration): any process can draw any of them, in any order, again."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.images import ImageSet, to_float
from d2o.data.latents import LatentSet
from d2o.data.pairs import PairStore
from d2o.methods.base import Batch


def mix(*parts: int | str) -> int:
    """A 63-bit seed from several numbers or words."""
    return int.from_bytes(hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1


class Batches:
    """Shuffled without replacement within each epoch. `share` (start, stop) is this process's part of the global batch.

    The next batch is read by a thread while the current one is computed.
    """

    def __init__(
        self,
        source: ImageSet | LatentSet | PairStore | None,
        batch: int,
        seed: int,
        share: tuple[int, int],
        device: torch.device,
        indices: Tensor | None = None,
        xflip: bool = False,
    ):
        self.source, self.batch, self.seed, self.share, self.device, self.xflip = (
            source,
            batch,
            seed,
            share,
            device,
            xflip,
        )
        self.indices = torch.arange(len(source)) if indices is None and source is not None else indices
        self.epochs: dict[int, np.ndarray] = {}
        self.ahead: tuple[int, Future[Batch]] | None = None
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def get(self, iteration: int) -> Batch:
        """This process's share of the batch of that iteration, on the device."""
        if self.source is None:
            return Batch()
        # The first batch is read here, not in the thread: what a source prepares once may run in parallel, and a second
        # set of OpenMP threads, once started, slows every parallel operation of this process down to the end (measured:
        # by a third).
        batch = (
            self.ahead[1].result() if self.ahead is not None and self.ahead[0] == iteration else self.read(iteration)
        )
        self.ahead = (iteration + 1, self.reader.submit(self.read, iteration + 1))
        parts = (batch.noise, batch.target, batch.images)
        noise, target, images = (None if t is None else t.to(self.device, non_blocking=True) for t in parts)
        condition = batch.condition.to(self.device, non_blocking=True)
        return Batch(condition, noise, target, None if images is None else self.finish(iteration, images))

    def close(self) -> None:
        self.reader.shutdown(cancel_futures=True)

    def positions(self, iteration: int) -> Tensor:
        """Which samples this process takes in that iteration. By numpy, since it runs in the thread, see `get`."""
        assert self.indices is not None
        n = len(self.indices)
        place = iteration * self.batch + np.arange(*self.share)
        out = np.empty_like(place)
        for epoch in np.unique(place // n).tolist():
            if epoch not in self.epochs:
                self.epochs = {e: order for e, order in self.epochs.items() if e >= epoch - 1}
                order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(self.seed, "epoch", epoch)))
                self.epochs[epoch] = self.indices[order].numpy()
            inside = place // n == epoch
            out[inside] = self.epochs[epoch][place[inside] % n]
        return torch.from_numpy(out)

    def read(self, iteration: int) -> Batch:
        index = self.positions(iteration)
        if isinstance(self.source, PairStore):
            noise, condition, target = self.source.batch(index)
            return Batch(condition, noise, target)
        assert self.source is not None
        labels = None if self.source.labels is None else self.source.labels[index]
        return Batch(Condition(len(index), labels), images=self.source.images(index))

    def finish(self, iteration: int, images: Tensor) -> Tensor:
        """uint8 -> [-1, 1], and random flips; on the device and in the main thread, see `get`. Stored latents stay as
        they are."""
        x = to_float(images) if images.dtype == torch.uint8 else images
        if self.xflip:
            generator = torch.Generator().manual_seed(mix(self.seed, "xflip", iteration))
            flip = torch.rand(self.batch, generator=generator)[self.share[0] : self.share[1]] < 0.5
            x = torch.where(flip[:, None, None, None].to(x.device), x.flip(3), x)
        return x
