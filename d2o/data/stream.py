"""Pairs in shuffled order for training, from stores of any size in bounded memory.

The order of an epoch is a block shuffle: the shards are permuted and taken `buffer` at a time; the pairs of such a
group are permuted among themselves. A store that is one group is permuted as a whole, and stays in memory. Epoch
follows upon epoch without end, and all of it is cut into global batches of world * batch pairs, of which each rank
takes its slice: any division of the same global batch among ranks gives the same pairs. The order depends on (seed,
epoch, buffer) and the store alone, and any place in it is reached without reading what comes before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from d2o.condition import Condition
from d2o.data.order import shuffled
from d2o.data.prompts import unpack
from d2o.errors import UserError
from d2o.work.folder import Ahead, Unit

GROUP_BYTES = 2**30
"""Noises and targets of a group take about this many bytes in float32, where `buffer` is not given."""


class Seeded(Protocol):
    """Settings that say the seed of pair 0."""

    @property
    def seed(self) -> int: ...


class Shards(Protocol):
    """What is streamed: a `data.pairs.PairStore`, or anything with its shards."""

    @property
    def settings(self) -> Seeded: ...

    @property
    def units(self) -> list[Unit]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def shard(self, number: int) -> Mapping[str, Tensor]: ...

    def forget(self, number: int) -> None: ...


class PairBatch(NamedTuple):
    """Some of a store's pairs: `noise` [B, ...] and `target` [B, ...] float32, and what they were asked to be."""

    noise: Tensor
    condition: Condition
    target: Tensor


class _Group(NamedTuple):
    """The shards of a group, whose first pair has `place` in the order of all epochs; its first `skip` pairs are not
    wanted."""

    epoch: int
    number: int
    place: int
    shards: list[int]
    skip: int


@dataclass(frozen=True)
class _Rows:
    """Pairs of one group in memory: a column for each tensor of the shards, as it is on the disk; prompts packed.
    `order`: which of them are this rank's, in their order."""

    order: np.ndarray
    seeds: np.ndarray
    columns: dict[str, np.ndarray]
    texts: dict[int, dict[str, Tensor]]  # by shard
    places: np.ndarray  # [n, 2]: shard, and row in it


class _Piece(NamedTuple):
    """The pairs first .. last - 1 of a group's order."""

    rows: _Rows
    first: int
    last: int


class PairStream:
    """`for noise, condition, target in stream` goes on without end: `itertools.islice` takes some.

    `batch`: pairs in a batch of this rank. `buffer`: shards in a group; this rank's part of one group, and of the next
    while it is fetched, is in memory (None: about 1 GiB of pairs). `prefetch`: batches made in advance in a thread,
    beside another that fetches the next group; 0: no threads.

    `position` is the number of the batch that comes next; `seek` goes to any. `close()`, or leaving a `with` block,
    ends the threads.
    UserError: numbers out of range.
    """

    def __init__(
        self,
        store: Shards,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer: int | None = None,
        prefetch: int = 2,
    ):
        buffer = _shards_at_once(store) if buffer is None else buffer
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
        self.buffer, self.prefetch = buffer, prefetch
        self.pairs = sum(unit.n for unit in store.units)
        self._position = 0
        self._whole: _Rows | None = None  # a store that is one group
        self._running: Ahead[list[_Piece], PairBatch] | None = None  # the batches that come next
        self._loading: Ahead[_Group, _Rows] | None = None  # the groups that they are made from

    @property
    def position(self) -> int:
        """The number of the batch that comes next."""
        return self._position

    def seek(self, position: int) -> None:
        """Make batch `position` the next one. UserError: there is none."""
        if position < 0:
            raise UserError(f"there is no batch {position}", "batches count from 0")
        if position != self._position:
            self.close()
            self._position = position

    def __iter__(self) -> Iterator[PairBatch]:
        return self

    def __next__(self) -> PairBatch:
        if self._running is None:
            self._running = Ahead(self._make, self._pieces(self._position), self.prefetch)
        try:
            batch = next(self._running)
        except BaseException:  # a shard that cannot be read: the next attempt starts from here
            self.close()
            raise
        self._position += 1
        return batch

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

    # Which pairs, in which order

    def _groups(self, position: int) -> Iterator[_Group]:
        """The groups from that batch on, without end."""
        begin = position * self.batch * self.world
        for epoch in itertools.count(begin // self.pairs):
            place, several = epoch * self.pairs, self.buffer < len(self.store.units)
            order = shuffled(len(self.store.units), self.seed, epoch, "shards") if several else self._all()
            for number, first in enumerate(range(0, len(order), self.buffer)):
                shards = order[first : first + self.buffer].tolist()
                n = sum(self.store.units[shard].n for shard in shards)
                if place + n > begin:
                    yield _Group(epoch, number, place, shards, max(begin - place, 0))
                place += n

    def _all(self) -> np.ndarray:
        return np.arange(len(self.store.units))

    def _order(self, group: _Group) -> np.ndarray:
        """This rank's pairs of the group, by their places in its shards, in their order."""
        n = sum(self.store.units[shard].n for shard in group.shards)
        whole = self.buffer >= len(self.store.units)
        order = shuffled(n, self.seed, group.epoch, *([] if whole else [group.number]))[group.skip :]
        places = np.arange(group.place + group.skip, group.place + n)
        return order[places % (self.batch * self.world) // self.batch == self.rank]

    def _pieces(self, position: int) -> Iterator[list[_Piece]]:
        """For each batch, without end, the parts of groups that it consists of."""
        groups = self._loading = Ahead(self._load, self._groups(position), min(self.prefetch, 1))
        rows, used = next(groups), 0
        while True:
            pieces, missing = [], self.batch
            while missing > len(rows.order) - used:
                pieces.append(_Piece(rows, used, len(rows.order)))
                missing -= len(rows.order) - used
                rows, used = next(groups), 0
            pieces.append(_Piece(rows, used, used + missing))
            used += missing
            yield pieces

    # Reading. numpy only: in a thread, a large operation of torch would start a second team of OpenMP threads.

    def _load(self, group: _Group) -> _Rows:
        """This rank's rows of the group; of a store that is one group all rows, once."""
        order = self._order(group)
        if self.buffer < len(self.store.units):
            return self._read(group.shards, order)
        if self._whole is None:
            self._whole = rows = self._read(group.shards, np.arange(self.pairs))
            if "noise" not in rows.columns:
                rows.columns["noise"] = np.empty((self.pairs, *self.store.shape), np.float32)
                draw_noise(rows.seeds.tolist(), torch.from_numpy(rows.columns["noise"]))
        return replace(self._whole, order=order)

    def _read(self, shards: list[int], wanted: np.ndarray) -> _Rows:
        """These pairs of these shards, which are read front to back, one at a time."""
        units = [self.store.units[shard] for shard in shards]
        bounds = np.cumsum([0, *(unit.n for unit in units)])
        slots = np.searchsorted(bounds, wanted, side="right") - 1
        places = np.stack([slots, wanted - bounds[slots]], axis=1)
        found = _Rows(np.arange(len(wanted)), np.empty(len(wanted), np.int64), {}, {}, places)
        for slot, (shard, unit) in enumerate(zip(shards, units)):
            here = np.flatnonzero(slots == slot)
            if not len(here):
                continue
            here = here[np.argsort(wanted[here], kind="stable")]
            rows = wanted[here] - bounds[slot]
            found.seeds[here] = self.store.settings.seed + unit.start + rows
            tensors = self.store.shard(shard)
            for name in ("target", "label", "guidance", "noise"):
                if name in tensors:
                    column = _array(tensors[name])
                    if name not in found.columns:
                        found.columns[name] = np.empty((len(wanted), *column.shape[1:]), column.dtype)
                    found.columns[name][here] = column if len(rows) == len(column) else column[rows]
            if "prompt_ends" in tensors:
                found.texts[slot] = {
                    name: torch.from_numpy(tensors[name].numpy().copy()) for name in ("prompt_bytes", "prompt_ends")
                }
            del tensors
            self.store.forget(shard)
        return found

    def _make(self, pieces: list[_Piece]) -> PairBatch:
        noise = torch.empty(self.batch, *self.store.shape)
        target = np.empty((self.batch, *self.store.shape), np.float32)
        found, prompts = dict[str, np.ndarray](), list[str]()
        has_prompts = any(piece.rows.texts for piece in pieces)
        at = 0
        for rows, first, last in pieces:
            if first == last:  # it may be of a group in which this rank has nothing
                continue
            part, chosen = slice(at, at + last - first), rows.order[first:last]
            _to_float(rows.columns["target"][chosen], target[part])
            if "noise" in rows.columns:
                noise.numpy()[part] = rows.columns["noise"][chosen]
            else:
                draw_noise(rows.seeds[chosen].tolist(), noise[part])
            for name in ("label", "guidance"):
                if name in rows.columns:
                    values = rows.columns[name][chosen]
                    found.setdefault(name, np.empty(self.batch, values.dtype))[part] = values
            if rows.texts:
                prompts += _texts(rows, chosen)
            at = part.stop
        condition = Condition(
            self.batch,
            torch.from_numpy(found["label"]) if "label" in found else None,
            tuple(prompts) if has_prompts else None,
            torch.from_numpy(found["guidance"]) if "guidance" in found else None,
        )
        return PairBatch(noise, condition, torch.from_numpy(target))


def _shards_at_once(store: Shards) -> int:
    """How many shards make a group, where that is not said; all of a store of `GROUP_BYTES`."""
    a_pair = 8 * math.prod(store.shape)
    if a_pair * sum(unit.n for unit in store.units) <= GROUP_BYTES:
        return len(store.units)
    return max(1, GROUP_BYTES // (a_pair * max(unit.n for unit in store.units)))


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


def _texts(rows: _Rows, chosen: np.ndarray) -> list[str]:
    found = [""] * len(chosen)
    places = rows.places[chosen]
    for slot in np.unique(places[:, 0]).tolist():
        here = np.flatnonzero(places[:, 0] == slot)
        for i, text in zip(here.tolist(), unpack(rows.texts[slot], places[here, 1])):
            found[i] = text
    return found
