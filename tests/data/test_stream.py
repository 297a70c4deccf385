"""The shuffled reader: what it gives is a function of (seed, epoch, buffer), whoever reads it and from wherever."""

import itertools
import threading
from dataclasses import dataclass

import pytest
import torch

from d2o.data import stream as module
from d2o.data.order import mix, shuffled
from d2o.data.pair_settings import PairSettings
from d2o.data.prompts import pack
from d2o.data.stream import PairStream, draw_noise
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


def take(stream, count):
    """The pairs of so many batches."""
    return [numbers(batch) for batch in itertools.islice(stream, count)]


@pytest.mark.parametrize("buffer", [1, 3, 100, None])
def test_every_pair_comes_exactly_once_in_an_epoch(buffer):
    with PairStream(Store(), 8, buffer=buffer) as stream:
        found = [i for batch in take(stream, 20) for i in batch]  # batches run on across the ends of epochs
        assert stream.position == 20
    epochs = [found[53 * e : 53 * e + 53] for e in range(3)]
    assert all(sorted(epoch) == list(range(53)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_is_a_function_of_the_seed():
    orders = [take(PairStream(Store(), 8, seed=seed, buffer=3), 10) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(len(b) == 8 for b in orders[0])


def test_a_store_that_is_one_group_is_permuted_as_a_whole():
    (batch,) = take(PairStream(Store(10, 3), 10, seed=5), 1)
    assert batch == torch.randperm(10, generator=torch.Generator().manual_seed(mix(5, "epoch", 0))).tolist()
    assert batch == shuffled(10, 5, 0).tolist()  # as images are, see `training.batches`


def test_shards_are_mixed_within_a_group_and_groups_are_drawn_at_random():
    batches = take(PairStream(Store(400, 10), 50, buffer=5), 8)
    shards = [{i // 10 for i in b} for b in batches]
    assert all(len(s) == 5 for s in shards)  # a batch of 50 is a group of 5 shards here
    assert sorted(number for s in shards for number in s) == list(range(40))
    assert any(max(s) - min(s) > 10 for s in shards)
    assert all(b != sorted(b) for b in batches)


@pytest.mark.parametrize("buffer", [3, None])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one(world, buffer):
    size = 4
    whole = take(PairStream(Store(), size * world, buffer=buffer), 12)
    ranks = [take(PairStream(Store(), size, rank=r, world=world, buffer=buffer), 12) for r in range(world)]
    assert [[i for part in parts for i in part] for parts in zip(*ranks, strict=True)] == whole


def test_a_store_smaller_than_a_batch_comes_several_times_in_it():
    (batch,) = take(PairStream(Store(7, 2), 21, buffer=2), 1)
    assert sorted(batch) == sorted([*range(7)] * 3)


@pytest.mark.parametrize("buffer", [4, None])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_any_place_is_resumed_as_if_nothing_had_happened(prefetch, buffer):
    def fresh(rank):
        return PairStream(Store(), 5, seed=3, rank=rank, world=2, buffer=buffer, prefetch=prefetch)

    for rank in range(2):
        with fresh(rank) as stream:
            batches = take(stream, 15)
            for k in (0, 1, 4, 5, 6, 11, 13):  # epochs end within batches 5 and 10
                with fresh(rank) as other:
                    other.seek(k)
                    assert other.position == k
                    assert take(other, 15 - k) == batches[k:]
            stream.seek(7)  # the same stream, back
            assert take(stream, 3) == batches[7:10]


def test_a_loop_that_is_left_goes_on_where_it_was():
    stream, whole = PairStream(Store(), 8, buffer=3), take(PairStream(Store(), 8, buffer=3), 7)
    begun = []
    for batch in stream:
        begun.append(numbers(batch))
        if len(begun) == 2:
            break
    assert begun + take(stream, 5) == whole


def test_resuming_reads_only_what_is_needed():
    store = Store(100, 5)
    stream = PairStream(store, 10, buffer=4, prefetch=0)
    stream.seek(8)
    take(stream, 2)
    assert len(store.read) == 4  # the last of five groups


def test_prefetching_changes_nothing():
    store = Store()
    with PairStream(Store(), 8, buffer=3, prefetch=4) as other:
        assert take(PairStream(store, 8, buffer=3, prefetch=0), 9) == take(other, 9)
    assert store.readers == {threading.get_ident()}


def test_a_store_that_is_one_group_is_read_once():
    store = Store(40, 8)
    with PairStream(store, 10) as stream:
        take(stream, 20)
        stream.seek(3)
        take(stream, 20)
    assert sorted(store.read) == list(range(5)) and store.most == 1 and not store.held


def test_memory_does_not_depend_on_the_size_of_the_store():
    store = Store(1000, 5)
    stream = PairStream(store, 10, buffer=4, prefetch=2)
    for k, _ in enumerate(itertools.islice(stream, 51)):
        # read so far: the batches that were given or wait, at most two groups of 4 shards that are in hand, and the
        # next
        assert len(store.read) <= 4 * (-(-(k + 4) * 10 // 20) + 2)
    stream.close()
    assert store.most == 1 and not store.held  # a shard is let go before the next is opened


def test_a_group_takes_a_share_of_the_memory(monkeypatch):
    a_pair = 8 * 6
    for size, buffer in ((10**9, 200), (a_pair * 5 * 7, 7), (a_pair * 5 * 7 - 1, 6), (1, 1)):
        monkeypatch.setattr(module, "GROUP_BYTES", size)
        assert PairStream(Store(1000, 5), 10).buffer == buffer


def test_closing_ends_the_threads():
    before = threading.active_count()
    with PairStream(Store(1000, 5), 10, buffer=4) as stream:
        numbers(next(stream))
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_targets_of_any_type_come_as_float32(dtype):
    store = Store(40, 8, dtype)
    exact = torch.randn(40, *SHAPE).to(dtype)
    store.shard = lambda number: {"target": exact[8 * number : 8 * number + 8]}
    with PairStream(store, 40) as stream:
        batch = next(stream)
    assert batch.condition.kind == "none"
    assert torch.equal(batch.target, exact[torch.from_numpy(shuffled(40, 0, 0))].float())


@pytest.mark.parametrize("buffer", [3, None])
def test_stored_noise_and_prompts_come_with_their_pairs(buffer):
    with PairStream(Store(noise=True, prompts=True, labels=False), 8, buffer=buffer) as stream:
        for batch in itertools.islice(stream, 10):
            assert torch.equal(batch.noise, -batch.target) and batch.condition.labels is None
            assert batch.condition.prompts == tuple(f"ünë {int(i)}" for i in batch.target[:, 0, 0])


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_pair_store_is_streamed_as_it_is_read(tmp_path, monkeypatch, where):
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    out = str(tmp_path / "store") if where == "disk" else f"memory://{tmp_path.name}/store"
    settings = PairSettings("tiny", 20, seed=5, solver="euler", steps=1, shard_size=8, dtype="bf16")
    store = make_pairs(settings, out, teacher=tiny_teacher())
    noise, condition, target = store.batch(range(20))
    found = []
    with PairStream(store, 4, buffer=2) as stream:
        for batch in itertools.islice(stream, 5):
            index = [next(i for i in range(20) if torch.equal(noise[i], row)) for row in batch.noise]
            assert torch.equal(batch.condition.labels, condition.labels[index])
            assert torch.equal(batch.target, target[index]) and batch.condition.prompts is None
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
    assert got + take(stream, 8) == take(PairStream(Store(), 8, buffer=1), len(got) + 8)


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
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        PairStream(Store(), **arguments)


def test_a_place_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="there is no batch -1"):
        PairStream(Store(), 8).seek(-1)
