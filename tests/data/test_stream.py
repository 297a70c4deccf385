"""The shuffled reader: what it gives is a function of (seed, epoch, buffer), whoever reads it and from wherever."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from d2o.data.pair_settings import PairSettings
from d2o.data.prompts import pack
from d2o.data.stream import PairStream, draw_noise, shuffled
from d2o.diffusion.noise import noise_for_seeds
from d2o.errors import UserError
from d2o.teachers.generate import make_pairs
from d2o.work.folder import cut
from tests.helpers import tiny_teacher

SHAPE = (2, 3)


@dataclass
class Settings:
    seed: int = 1000


class Store:
    """Pair i has target [i, i, ...], label i mod 7 and prompt "i"; counts the shards that are held at a time."""

    def __init__(self, n=53, size=5, dtype=torch.float32, noise=False, labels=True, prompts=False):
        self.settings, self.units, self.shape = Settings(), cut(n, size, "shard-{:05d}"), SHAPE
        self.dtype, self.noise, self.labels, self.prompts = dtype, noise, labels, prompts
        self.held, self.most, self.read, self.readers = set(), 0, [], set()

    def shard(self, number):
        self.held.add(number)
        self.most = max(self.most, len(self.held))
        self.read.append(number)
        self.readers.add(threading.get_ident())
        unit = self.units[number]
        index = torch.arange(unit.start, unit.start + unit.n)
        tensors = {"target": index.view(-1, 1, 1).expand(-1, *SHAPE).to(self.dtype)}
        if self.noise:
            tensors["noise"] = -tensors["target"].float()
        if self.labels:
            tensors["label"] = index % 7
        if self.prompts:
            tensors |= pack([f"ünë {i}" for i in index.tolist()])
        return tensors

    def forget(self, number):
        self.held.discard(number)


def numbers(batch):
    """Which pairs are in the batch; checks that all that belongs together came together."""
    index = batch.target[:, 0, 0].long()
    assert (
        torch.equal(batch.target, index.view(-1, 1, 1).expand(-1, *SHAPE).float())
        and batch.target.dtype == torch.float32
    )
    assert torch.equal(batch.noise, noise_for_seeds((1000 + index).tolist(), SHAPE))
    assert (
        batch.condition.labels is not None
        and batch.condition.labels.dtype == torch.int64
        and torch.equal(batch.condition.labels, index % 7)
    )
    return index.tolist()


def epoch(stream):
    return [numbers(batch) for batch in stream]


@pytest.mark.parametrize("buffer", [1, 3, 100])
def test_every_pair_comes_exactly_once_in_an_epoch(buffer):
    stream = PairStream(Store(), 8, buffer=buffer, drop_last=False)
    first, second = epoch(stream), epoch(stream)
    assert [len(b) for b in first] == [8] * 6 + [5] and len(stream) == 7
    for batches in (first, second):
        assert sorted(i for b in batches for i in b) == list(range(53))
    assert first != second
    assert stream.position == (2, 0)
    stream.close()


def test_the_order_is_a_function_of_the_seed():
    orders = [epoch(PairStream(Store(), 8, seed=seed, buffer=3)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(len(b) == 8 for b in orders[0]) and len(orders[0]) == 6  # what fills no batch is left out
    assert shuffled(10, 1, 2).tolist() == [5, 6, 9, 3, 2, 1, 0, 8, 4, 7]  # in any version


def test_shards_are_mixed_within_a_group_and_groups_are_drawn_at_random():
    batches = epoch(PairStream(Store(400, 10), 50, buffer=5))
    shards = [{i // 10 for i in b} for b in batches]
    assert all(len(s) == 5 for s in shards)  # a batch of 50 is a group of 5 shards here
    assert sorted(number for s in shards for number in s) == list(range(40))
    assert any(max(s) - min(s) > 10 for s in shards)
    assert all(b != sorted(b) for b in batches)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one(world, drop_last):
    size = 4
    whole = epoch(PairStream(Store(), size * world, buffer=3, drop_last=drop_last))
    ranks = [epoch(PairStream(Store(), size, rank=r, world=world, buffer=3, drop_last=drop_last)) for r in range(world)]
    assert [[i for part in parts for i in part] for parts in zip(*ranks, strict=True)] == whole


def test_a_last_batch_smaller_than_the_ranks_is_still_the_same_number_of_batches():
    ranks = [epoch(PairStream(Store(7, 2), 2, rank=r, world=3, buffer=2, drop_last=False)) for r in range(3)]
    assert [[len(b) for b in batches] for batches in ranks] == [[2, 0], [2, 0], [2, 1]]
    assert sorted(i for batches in ranks for b in batches for i in b) == list(range(7))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_any_place_is_resumed_as_if_nothing_had_happened(prefetch):
    def fresh(rank):
        return PairStream(Store(), 5, seed=3, rank=rank, world=2, buffer=4, prefetch=prefetch)

    for rank in range(2):
        stream = fresh(rank)
        positions, batches = [], []
        for _ in range(3):
            for batch in stream:
                positions.append(stream.position)
                batches.append(numbers(batch))
        assert positions == [
            (0, 1),
            (0, 2),
            (0, 3),
            (0, 4),
            (1, 0),
            (1, 1),
            (1, 2),
            (1, 3),
            (1, 4),
            (2, 0),
            (2, 1),
            (2, 2),
            (2, 3),
            (2, 4),
            (3, 0),
        ]
        for k, (at, index) in enumerate(positions[:-1]):
            other = fresh(rank)
            other.seek(at, index)
            assert other.position == (at, index)
            rest = [batch for _ in range(3 - at) for batch in epoch(other)]
            assert rest == batches[k + 1 :]
        stream.seek(1, 2)  # the same stream, back
        assert epoch(stream) == batches[7:10]


def test_a_loop_that_is_left_goes_on_where_it_was():
    stream, whole = PairStream(Store(), 8, buffer=3), epoch(PairStream(Store(), 8, buffer=3))
    begun = []
    for batch in stream:
        begun.append(numbers(batch))
        if len(begun) == 2:
            break
    assert begun + epoch(stream) == whole


def test_resuming_reads_only_what_is_needed():
    store = Store(100, 5)
    stream = PairStream(store, 10, buffer=4, prefetch=0)
    stream.seek(0, 8)
    epoch(stream)
    assert len(store.read) == 4  # the last of five groups


def test_prefetching_changes_nothing():
    store = Store()
    assert epoch(PairStream(store, 8, buffer=3, prefetch=0)) == epoch(PairStream(Store(), 8, buffer=3, prefetch=4))
    assert store.readers == {threading.get_ident()}


def test_memory_does_not_depend_on_the_size_of_the_store():
    store = Store(1000, 5)
    stream = PairStream(store, 10, buffer=4, prefetch=2)
    for k, _ in enumerate(stream):
        # read so far: the batches that were given or wait, at most two groups of 4 shards that are in hand, and the
        # next
        assert len(store.read) <= 4 * (-(-(k + 4) * 10 // 20) + 2)
        if k == 50:
            break
    stream.close()
    assert store.most == 1 and not store.held  # a shard is let go before the next is opened


def test_closing_ends_the_threads():
    before = threading.active_count()
    with PairStream(Store(1000, 5), 10, buffer=4) as stream:
        numbers(next(iter(stream)))
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_targets_of_any_type_come_as_float32(dtype):
    store = Store(40, 8, dtype)
    exact = torch.randn(40, *SHAPE).to(dtype)
    store.shard = lambda number: {"target": exact[8 * number : 8 * number + 8]}
    stream = PairStream(store, 40, buffer=5)
    (batch,) = stream
    order = shuffled(5, 0, 0)
    rows = np.concatenate([np.arange(8 * s, 8 * s + 8) for s in order])[shuffled(40, 0, 0, 1)]
    assert batch.condition.labels is None and batch.condition.prompts is None
    assert torch.equal(batch.target, exact[torch.from_numpy(rows)].float())
    stream.close()


def test_stored_noise_and_prompts_come_with_their_pairs():
    for batch in PairStream(Store(noise=True, prompts=True, labels=False), 8, buffer=3):
        assert torch.equal(batch.noise, -batch.target) and batch.condition.labels is None
        assert batch.condition.prompts == tuple(f"ünë {int(i)}" for i in batch.target[:, 0, 0])


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_pair_store_is_streamed_as_it_is_read(tmp_path, monkeypatch, where):
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    out = str(tmp_path / "store") if where == "disk" else f"memory://{tmp_path.name}/store"
    settings = PairSettings("tiny", 20, seed=5, solver="euler", steps=1, shard_size=8, dtype="bf16")
    store = make_pairs(settings, out, teacher=tiny_teacher())
    noise, condition, target = store.batch(range(20))
    labels = condition.labels
    found = []
    for batch in PairStream(store, 3, buffer=2, drop_last=False):
        index = [next(i for i in range(20) if torch.equal(noise[i], row)) for row in batch.noise]
        assert (
            torch.equal(batch.condition.labels, labels[index])
            and torch.equal(batch.target, target[index])
            and batch.condition.prompts is None
        )
        found += index
    assert sorted(found) == list(range(20))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 3, 3), (1,), (3, 32, 32)])
def test_noise_is_that_of_the_seeds(shape):
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 12345678901]
    out = torch.empty(len(seeds), *shape)
    draw_noise(seeds, out)
    assert torch.equal(out, noise_for_seeds(seeds, shape))


def test_a_shard_that_cannot_be_read_is_told_and_tried_again():
    store, fail = Store(), True
    shard = store.shard

    def sometimes(number):
        if fail and number == 4:
            raise UserError("shard-00004 is damaged")
        return shard(number)

    store.shard = sometimes
    stream, got = PairStream(store, 8, buffer=1), []
    with pytest.raises(UserError, match="shard-00004 is damaged"):
        for batch in stream:
            got.append(numbers(batch))
    fail = False
    assert got + epoch(stream) == epoch(PairStream(Store(), 8, buffer=1))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"batch": 4, "world": 0}, "world must be at least 1"),
        ({"batch": 4, "rank": 2, "world": 2}, "rank must be from 0 to 1, not 2"),
        ({"batch": 4, "rank": -1}, "rank must be from 0 to 0, not -1"),
        ({"batch": 4, "buffer": 0}, "buffer must be at least 1"),
        ({"batch": 4, "prefetch": -1}, "prefetch must be at least 0"),
        ({"batch": 4, "seed": -1}, "seed must be at least 0"),
        ({"batch": 30, "world": 2}, r"53 pairs, fewer than one batch of 60 \(30 on each of 2 ranks\)"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        PairStream(Store(), **arguments)


@pytest.mark.parametrize("position", [(-1, 0), (0, -1), (0, 6)])
def test_a_place_that_is_not_there_is_refused(position):
    with pytest.raises(UserError, match="an epoch has batches 0 to 5"):
        PairStream(Store(), 8).seek(*position)
