"""Batches as a pure function of (seed, iteration): any process can draw any of them, in any order, again."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.images import ImageSet, to_float
from d2o.data.order import mix, shuffled
from d2o.data.pairs import PairStore
from d2o.data.prompts import Prompts
from d2o.data.stored_latents import LatentSet
from d2o.data.stream import PairStream
from d2o.data.triplets import TripletSet
from d2o.methods.base import Batch, Reals


class Batches:
    """What a method takes that needs no data. Of the others a batch is shuffled without replacement within each epoch,
    and the next one is read by a thread while the current one is computed."""

    def get(self, iteration: int) -> Batch:
        """This process's share of the batch of that iteration, on the device."""
        return Batch()

    def close(self) -> None:
        """End the threads."""


def open_batches(
    source: ImageSet | LatentSet | TripletSet | PairStore | None,
    batch: int,
    seed: int,
    share: tuple[int, int],
    device: torch.device,
    indices: Tensor | None = None,
    xflip: bool = False,
    prompts: Prompts | None = None,
    beside: tuple[ImageSet | LatentSet | TripletSet, float] | None = None,
) -> Batches:
    """The batches of a source. `share` (start, stop) is this process's part of the global batch, all parts are of one
    size. `indices`: the images that are drawn from; None: all. `prompts`: the images' own, one each.
    `beside`: of pairs, images for that share of the rows."""
    if source is None:
        return Batches()
    if isinstance(source, PairStore):
        pairs = PairBatches(source, batch, seed, share, device)
        if beside is None:
            return pairs
        images, part = beside
        return MixedBatches(pairs, RealBatches(images, batch, seed, share, device, part, xflip, prompts))
    return ImageBatches(source, batch, seed, share, device, indices, xflip, prompts)


class PairBatches(Batches):
    """Of a pair store, streamed."""

    def __init__(self, store: PairStore, batch: int, seed: int, share: tuple[int, int], device: torch.device):
        size = share[1] - share[0]
        self.stream = PairStream(store, size, seed, share[0] // size, batch // size)
        self.device = device

    def get(self, iteration: int) -> Batch:
        self.stream.seek(iteration)
        noise, condition, target = next(self.stream)
        noise, target = (t.to(self.device, non_blocking=True) for t in (noise, target))
        return Batch(condition.to(self.device, non_blocking=True), noise, target)

    def close(self) -> None:
        self.stream.close()


class ImageBatches(Batches):
    """Of images, stored latents or triplets; images as float in [-1, 1]."""

    on_host = False  # whether classes stay there

    def __init__(
        self,
        source: ImageSet | LatentSet | TripletSet,
        batch: int,
        seed: int,
        share: tuple[int, int],
        device: torch.device,
        indices: Tensor | None = None,
        xflip: bool = False,
        prompts: Prompts | None = None,
    ):
        self.source, self.batch, self.seed, self.share, self.prompts = source, batch, seed, share, prompts
        self.device, self.xflip = device, xflip
        self.indices = torch.arange(len(source)) if indices is None else indices
        self.epochs: dict[int, np.ndarray] = {}
        self.ahead: tuple[int, Future[Batch]] | None = None
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def get(self, iteration: int) -> Batch:
        # The first batch is read here, not in the thread: what a source prepares once may run in parallel, and a second
        # set of OpenMP threads, once started, slows every parallel operation of this process down to the end (measured:
        # by a third).
        batch = (
            self.ahead[1].result() if self.ahead is not None and self.ahead[0] == iteration else self.read(iteration)
        )
        self.ahead = (iteration + 1, self.reader.submit(self.read, iteration + 1))
        images = batch.images
        if images is not None:  # of some rows there may be none
            images = self.finish(iteration, images.to(self.device, non_blocking=True))
        target = None if batch.target is None else batch.target.to(self.device, non_blocking=True)
        asked = batch.condition if self.on_host else batch.condition.to(self.device, non_blocking=True)
        return Batch(asked, target=target, images=images)

    def close(self) -> None:
        self.reader.shutdown(cancel_futures=True)

    def mine(self, iteration: int, values: Tensor) -> Tensor:
        """Of values of the rows of the global batch those of the rows that this process reads."""
        return values[self.share[0] : self.share[1]]

    def positions(self, iteration: int) -> Tensor:
        """Which images this process takes in that iteration. By numpy, since it runs in the thread, see `get`."""
        n = len(self.indices)
        place = iteration * self.batch + np.arange(*self.share)
        out = np.empty_like(place)
        for epoch in np.unique(place // n).tolist():
            if epoch not in self.epochs:
                self.epochs = {e: order for e, order in self.epochs.items() if e >= epoch - 1}
                self.epochs[epoch] = self.indices.numpy()[shuffled(n, self.seed, epoch)]
            inside = place // n == epoch
            out[inside] = self.epochs[epoch][place[inside] % n]
        return torch.from_numpy(out)

    def read(self, iteration: int) -> Batch:
        index = self.positions(iteration)
        if self.prompts is not None:
            asked = Condition.of_prompts(self.prompts.many(index.tolist()))
            return Batch(asked, images=self.source.images(index))
        if isinstance(self.source, TripletSet):
            judged = self.source.judgements[index]
            return Batch(Condition.none(len(index)), target=judged, images=self.source.images(index))
        labels = None if self.source.labels is None else self.source.labels[index]
        return Batch(Condition(len(index), labels), images=self.source.images(index))

    def finish(self, iteration: int, images: Tensor) -> Tensor:
        """uint8 -> [-1, 1], and random flips; on the device and in the main thread, see `get`. Stored latents stay as
        they are."""
        x = to_float(images) if images.dtype == torch.uint8 else images
        if self.xflip:
            generator = torch.Generator().manual_seed(mix(self.seed, "xflip", iteration))
            flip = self.mine(iteration, torch.rand(self.batch, generator=generator)) < 0.5
            x = torch.where(flip[:, None, None, None].to(x.device), x.flip(3), x)
        return x


class RealBatches(ImageBatches):
    """Images for some rows of the batch, each with the chance `part`, drawn from (seed, iteration): they are the same
    rows on any number of processes, and no others are read."""

    on_host = True  # captions are made of them

    def __init__(
        self,
        source: ImageSet | LatentSet | TripletSet,
        batch: int,
        seed: int,
        share: tuple[int, int],
        device: torch.device,
        part: float,
        xflip: bool = False,
        prompts: Prompts | None = None,
    ):
        super().__init__(source, batch, seed, share, device, None, xflip, prompts)
        self.part = part

    def rows(self, iteration: int) -> Tensor:
        """Which rows of this process's share."""
        generator = torch.Generator().manual_seed(mix(self.seed, "real rows", iteration))
        chance = torch.rand(self.batch, generator=generator)[self.share[0] : self.share[1]]
        return (chance < self.part).nonzero()[:, 0]

    def mine(self, iteration: int, values: Tensor) -> Tensor:
        return super().mine(iteration, values)[self.rows(iteration)]

    def positions(self, iteration: int) -> Tensor:
        return super().positions(iteration)[self.rows(iteration)]

    def read(self, iteration: int) -> Batch:
        return super().read(iteration) if len(self.rows(iteration)) else Batch()

    def reals(self, iteration: int) -> Reals:
        found = self.get(iteration)
        return Reals(self.rows(iteration).tolist(), found.images, found.condition)


class MixedBatches(Batches):
    """Of a pair store, with real images beside."""

    def __init__(self, pairs: PairBatches, images: RealBatches):
        self.pairs, self.images = pairs, images

    def get(self, iteration: int) -> Batch:
        return replace(self.pairs.get(iteration), reals=self.images.reals(iteration))

    def close(self) -> None:
        self.pairs.close()
        self.images.close()
