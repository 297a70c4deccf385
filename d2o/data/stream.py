"""Pairs in shuffled order for training, from stores of any size in bounded memory.

The order of an epoch is a block shuffle: the shards are permuted and taken `buffer` at a time; the pairs of such a
group are permuted among themselves. It is cut into global batches of world * batch pairs, of which each rank takes its
slice: any division of the same global batch among ranks gives the same pairs. The order depends on (seed, epoch,
buffer) and the store alone, by way of random bits that numpy keeps the same in all its versions, and any place in it is
reached without reading what comes before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.prompts import unpack
from d2o.errors import UserError
from d2o.work.folder import Ahead, Unit


class Shards(Protocol):
    """What is streamed: a `data.pairs.PairStore`, or anything with its shards."""

    @property
    def settings(self) -> Any: ...  # .seed: that of pair 0

    @property
    def units(self) -> list[Unit]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def shard(self, number: int) -> Mapping[str, Tensor]: ...

    def forget(self, number: int) -> None: ...


class Pairs(NamedTuple):
    """Some of a store's pairs: `noise` [B, ...] and `target` [B, ...] float32, and what they were asked to be."""

    noise: Tensor
    condition: Condition
    target: Tensor


class _Wanted(NamedTuple):
    """What to read of a group: its shards, whose first pair has `place` in the order of the epoch, without the first
    `skip` pairs."""

    epoch: int
    number: int
    place: int
    shards: list[int]
    skip: int


@dataclass
class _Rows:
    """This rank's pairs of one group, in their order: a column for each tensor of the shards, as it is on the disk;
    prompts packed."""

    seeds: np.ndarray
    columns: dict[str, np.ndarray]
    texts: dict[int, dict[str, Tensor]]  # by shard
    places: np.ndarray  # [n, 2]: shard, and row in it


class PairStream:
    """`for noise, condition, target in stream` gives the rest of the present epoch; the next such loop gives the
    next epoch.

    `batch`: pairs in a batch of this rank. `buffer`: shards in a group; this rank's part of one group, and of the next
    while it is fetched, is
    in memory. `drop_last`: leave out the pairs of an epoch that fill no global batch; else they come in a smaller last
    one, cut evenly (ranks may get none). `prefetch`: batches made in advance in a thread, beside another that fetches
    the next group; 0: no threads.

    `position` is (epoch, index) of the next batch; `seek` goes there. `close()`, or leaving a `with` block, ends the
    threads.
    UserError: numbers out of range; a store smaller than one global batch.
    """

    def __init__(
        self,
        store: Shards,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer: int = 16,
        drop_last: bool = True,
        prefetch: int = 2,
    ):
        for name, value, least in (
            ("batch", batch, 1),
            ("world", world, 1),
            ("buffer", buffer, 1),
            ("prefetch", prefetch, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        if not 0 <= rank < world:
            raise UserError(f"rank must be from 0 to {world - 1}, not {rank}", "ranks count from 0")
        self.store, self.batch, self.seed, self.rank, self.world = store, batch, seed, rank, world
        self.buffer, self.drop_last, self.prefetch = buffer, drop_last, prefetch
        self.pairs = sum(unit.n for unit in store.units)
        if drop_last and self.pairs < batch * world:
            what = f"the store has {self.pairs} pairs, fewer than one batch of {batch * world}"
            raise UserError(
                what + (f" ({batch} on each of {world} ranks)" if world > 1 else ""), "choose a smaller batch"
            )
        self._position = (0, 0)
        self._running: Ahead[Any, Pairs] | None = None  # the batches that come next
        self._loading: Ahead[Any, Any] | None = None  # the groups that they are made from

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self.pairs, self.batch * self.world)
        return whole if self.drop_last or not rest else whole + 1

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, index) of the batch that comes next."""
        return self._position

    def seek(self, epoch: int, index: int = 0) -> None:
        """Make batch `index` of that epoch the next one. UserError: there is none."""
        if epoch < 0 or not 0 <= index < len(self):
            raise UserError(f"there is no batch {index} in epoch {epoch}", f"an epoch has batches 0 to {len(self) - 1}")
        self.close()
        self._position = (epoch, index)

    def __iter__(self) -> Iterator[Pairs]:
        epoch = self._position[0]
        while self._position[0] == epoch:
            yield self._next()

    def close(self) -> None:
        """End the threads; the stream can be used again."""
        for reader in (self._running, self._loading):
            if reader is not None:
                reader.close()
        self._running = self._loading = None

    def __enter__(self) -> PairStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> Pairs:
        if self._running is None:
            self._running = Ahead(self._make, self._pieces(*self._position), self.prefetch)
        try:
            batch = next(self._running)
        except BaseException:  # a shard that cannot be read: the next attempt starts from here
            self.close()
            raise
        epoch, index = self._position
        self._position = (epoch, index + 1) if index + 1 < len(self) else (epoch + 1, 0)
        return batch

    # Which pairs, in which order

    def _groups(self, epoch: int) -> list[tuple[int, list[int]]]:
        """(place of its first pair in the order of the epoch, its shards) of each group."""
        order = shuffled(len(self.store.units), self.seed, epoch).tolist()
        found, place = [], 0
        for first in range(0, len(order), self.buffer):
            shards = order[first : first + self.buffer]
            found.append((place, shards))
            place += sum(self.store.units[number].n for number in shards)
        return found

    def _mine(self, places: np.ndarray) -> np.ndarray:
        """Which of these places in the order of an epoch are this rank's."""
        size = self.batch * self.world
        whole, rest = divmod(self.pairs, size)
        mine = (places % size) // self.batch == self.rank
        last = places >= whole * size
        begin, end = (
            (0, 0) if self.drop_last else (self.rank * rest // self.world, (self.rank + 1) * rest // self.world)
        )
        within = places - whole * size
        return np.where(last, (within >= begin) & (within < end), mine)

    def _size(self, index: int) -> int:
        """Pairs in this rank's batch of that index."""
        whole, rest = divmod(self.pairs, self.batch * self.world)
        return self.batch if index < whole else (self.rank + 1) * rest // self.world - self.rank * rest // self.world

    def _wanted(self, epoch: int, index: int) -> Iterator[_Wanted]:
        """The groups from that batch on, without end."""
        for now in itertools.count(epoch):
            first = index * self.batch * self.world if now == epoch else 0
            for number, (place, shards) in enumerate(self._groups(now)):
                if place + sum(self.store.units[shard].n for shard in shards) > first:
                    yield _Wanted(now, number, place, shards, max(first - place, 0))

    def _pieces(self, epoch: int, index: int) -> Iterator[list[tuple[_Rows, int, int]]]:
        """For each batch, without end, the parts of groups that it consists of: (rows, first, last + 1)."""
        groups = self._loading = Ahead(self._load, self._wanted(epoch, index), min(self.prefetch, 1))
        rows, used = next(groups), 0
        for now in itertools.count(epoch):
            for number in range(index if now == epoch else 0, len(self)):
                pieces, missing = [], self._size(number)
                while missing > len(rows.seeds) - used:
                    pieces.append((rows, used, len(rows.seeds)))
                    missing -= len(rows.seeds) - used
                    rows, used = next(groups), 0
                pieces.append((rows, used, used + missing))
                used += missing
                yield pieces

    # Reading. numpy only: in a thread, a large operation of torch would start a second team of OpenMP threads.

    def _load(self, group: _Wanted) -> _Rows:
        """This rank's rows of the group; shards are read front to back, one at a time."""
        units = [self.store.units[shard] for shard in group.shards]
        bounds = np.cumsum([0, *(unit.n for unit in units)])
        mine = self._mine(np.arange(group.place + group.skip, group.place + bounds[-1]))
        order = shuffled(int(bounds[-1]), self.seed, group.epoch, 1 + group.number)[group.skip :][mine]
        slots = np.searchsorted(bounds, order, side="right") - 1
        found = _Rows(np.empty(len(order), np.int64), {}, {}, np.stack([slots, order - bounds[slots]], axis=1))
        for slot, (shard, unit) in enumerate(zip(group.shards, units)):
            here = np.flatnonzero(slots == slot)
            if not len(here):
                continue
            here = here[np.argsort(order[here], kind="stable")]
            rows = order[here] - bounds[slot]
            found.seeds[here] = self.store.settings.seed + unit.start + rows
            tensors = self.store.shard(shard)
            for name in ("target", "label", "noise"):
                if name in tensors:
                    column = _array(tensors[name])
                    if name not in found.columns:
                        found.columns[name] = np.empty((len(order), *column.shape[1:]), column.dtype)
                    found.columns[name][here] = column if len(rows) == len(column) else column[rows]
            if "prompt_ends" in tensors:
                found.texts[slot] = {
                    name: torch.from_numpy(tensors[name].numpy().copy()) for name in ("prompt_bytes", "prompt_ends")
                }
            del tensors
            self.store.forget(shard)
        return found

    def _make(self, pieces: list[tuple[_Rows, int, int]]) -> Pairs:
        n = sum(last - first for _, first, last in pieces)
        noise, target = torch.empty(n, *self.store.shape), np.empty((n, *self.store.shape), np.float32)
        labels, prompts = np.empty(n, np.int64), list[str]()
        has_labels = any("label" in rows.columns for rows, _, _ in pieces)
        has_prompts = any(rows.texts for rows, _, _ in pieces)
        at = 0
        for rows, first, last in pieces:
            if first == last:  # it may be of a group in which this rank has nothing
                continue
            part = slice(at, at + last - first)
            _to_float(rows.columns["target"][first:last], target[part])
            if "noise" in rows.columns:
                noise.numpy()[part] = rows.columns["noise"][first:last]
            else:
                draw_noise(rows.seeds[first:last].tolist(), noise[part])
            if "label" in rows.columns:
                labels[part] = rows.columns["label"][first:last]
            if rows.texts:
                prompts += _texts(rows, first, last)
            at = part.stop
        condition = Condition(
            n,
            torch.from_numpy(labels) if has_labels else None,
            tuple(prompts) if has_prompts else None,
        )
        return Pairs(noise, condition, torch.from_numpy(target))


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of 0 .. n - 1 that is a function of n and `key`. (numpy promises the raw bits, not what
    `permutation` makes of them.)"""
    return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable")


def draw_noise(seeds: list[int], out: Tensor) -> None:
    """`diffusion.noise.noise_for_seeds(seeds, out.shape[1:])` into `out`, at about 3 us a pair of 4x8x8 where that
    takes 5."""
    generator = torch.Generator()
    for seed, row in zip(seeds, out.unbind(0)):
        generator.manual_seed(seed % 2**32)
        row.normal_(generator=generator)


def _array(tensor: Tensor) -> np.ndarray:
    """As a numpy array without copying; bfloat16, which numpy has not, as its bits."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _to_float(values: np.ndarray, out: np.ndarray) -> None:
    """Into float32, from a column of `_array`."""
    if values.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        bits = out.view(np.uint32)
        bits[...] = values
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = values


def _texts(rows: _Rows, first: int, last: int) -> list[str]:
    found = [""] * (last - first)
    places = rows.places[first:last]
    for slot in np.unique(places[:, 0]).tolist():
        here = np.flatnonzero(places[:, 0] == slot)
        for i, text in zip(here.tolist(), unpack(rows.texts[slot], places[here, 1])):
            found[i] = text
    return found
