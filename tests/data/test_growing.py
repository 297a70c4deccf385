"""Stores that grow: what is asked for later ends with the bytes of what would have been asked for at once."""

import itertools
import signal
import threading
from pathlib import Path

import pytest
import torch

from d2o.data.pair_settings import PairSettings
from d2o.data.pairs import PairStore
from d2o.data.stream import PairStream
from d2o.errors import UserError
from d2o.teachers.base import Teacher
from d2o.teachers.compute import Compute
from d2o.teachers.generate import Share, make_pairs
from tests.helpers import TinyText, tensors, tiny_teacher
from tests.workers import files, finish, start, wait_for


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """(path, teacher)"""
    path = tmp_path_factory.mktemp("teacher") / "t.safetensors"
    return path, tiny_teacher(path)


@pytest.fixture
def build(teacher, tmp_path):
    def run(name="store", n=20, teacher_=None, say=lambda text: None, share=Share(), **settings):
        settings = {"solver": "euler", "steps": 2, "shard_size": 8, **settings}
        out = name if "://" in str(name) else tmp_path / name
        how = {"compute": Compute(4, 1), "teacher": teacher_ or teacher[1], "say": say, "share": share}
        return make_pairs(PairSettings(str(teacher[0]), n, **settings), out, **how)

    return run


@pytest.fixture
def count(monkeypatch):
    """The sizes of the batches that the teacher was given."""
    sizes = []
    sample = Teacher.sample
    monkeypatch.setattr(
        Teacher, "sample", lambda self, noise, *a, **k: sizes.append(len(noise)) or sample(self, noise, *a, **k)
    )
    return sizes


def arguments(teacher, out, n):
    options = {"n": n, "solver": "euler", "steps": 2, "shard-size": 8, "batch": 4, "threads": 1, "device": "cpu"}
    return [
        "pairs",
        "--teacher",
        teacher[0],
        "--out",
        out,
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    ]


@pytest.mark.parametrize("kind", [{}, {"store_noise": True, "dtype": "bf16"}, {"labels": "balanced", "cfg": 2.0}])
def test_a_store_grows_to_the_bytes_of_one_made_at_once(build, count, kind):
    whole, said = build("whole", 45, **kind), []
    count.clear()
    for n in (3, 22, 45):
        store = build(n=n, say=said.append, **kind)
        assert len(store) == n
    assert files(store.path) == files(whole.path) and store.verify() == [] and store.fingerprint == whole.fingerprint
    assert sum(count) == 45 + 3 + 2  # what was made beside fewer others is made again, whole batches are not
    assert any("grows from 3 to 22 pairs" in line for line in said)


def test_prompts_and_another_file_system_grow_too(build, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    more = {"teacher_": TinyText(), "prompts": str(tmp_path / "prompts.txt")}
    whole = build("whole", 21, **more)
    build(n=5, **more)
    assert files(build(n=21, **more).path) == files(whole.path)

    from fsspec.implementations.memory import MemoryFileSystem

    build("memory://growing/store", n=5)
    assert len(build("memory://growing/store", n=21)) == 21
    build("plain", 21)
    held = {
        Path(name).name: MemoryFileSystem().cat(name)
        for name in MemoryFileSystem().find("/growing/store")
        if "timing" not in name
    }
    assert held == files(tmp_path / "plain")


def test_fewer_are_there_already(build, count):
    whole, said = build(n=20), []
    before = files(whole.path)
    count.clear()
    store = build(n=9, say=said.append)
    assert len(store) == 9 and not count and files(store.path) == before
    assert any("holds 20 pairs already, and so the first 9; nothing to do" in line for line in said)
    some = PairStore(whole.path, n=9)
    for a, b in zip(tensors(some.batch(range(9))), tensors(whole.batch(range(9)))):
        assert torch.equal(a, b)
    with pytest.raises(IndexError):
        some[9]
    with pytest.raises(UserError, match="holds 20 pairs, not 21"):
        PairStore(whole.path, n=21)


def test_the_first_pairs_stream_as_a_store_of_so_many_does(build):
    small, large = build("small", n=10), build("large", n=20)
    a, b = (PairStream(store, 3, seed=1, buffer=1) for store in (small, PairStore(large.path, n=10)))
    for x, y in itertools.islice(zip(a, b), 8):
        assert (
            torch.equal(x.noise, y.noise)
            and torch.allclose(x.target, y.target, atol=1e-5)
            and torch.equal(x.condition.labels, y.condition.labels)
        )


def test_a_rewired_store_does_not_grow(build):
    build(n=8, rewire="permute")
    for n in (7, 9):
        with pytest.raises(UserError, match="permuted over the whole store"):
            build(n=n, rewire="permute")
    with pytest.raises(UserError, match="permuted over the whole store"):
        PairStore(build(n=8, rewire="permute").path, n=4)


@pytest.mark.parametrize(
    "die_in, die_at", [("replace", 1), ("compute", 1), ("replace", 2), ("record", 1), ("record", 2), ("replace", 3)]
)
def test_a_kill_while_it_grows(build, teacher, tmp_path, die_in, die_at):
    whole = build("whole", 21)
    store = build(n=5)
    assert (
        finish(start(arguments(teacher, store.path, 21), tmp_path / "log", die_in=die_in, die_at=die_at))
        == -signal.SIGKILL
    )
    if die_at == 1 and die_in != "record":  # the pairs of before stay readable
        assert len(PairStore(store.path, n=5)) == 5
    assert len(build(n=5)) == 5
    assert files(build(n=21).path) == files(whole.path)


def test_two_workers_of_which_one_wants_more(build, teacher, tmp_path):
    whole, out = build("whole", 37), tmp_path / "store"
    small = start(arguments(teacher, out, 21), tmp_path / "small", pause=0.15)
    wait_for(lambda: (out / ".locks" / "shard-00000.safetensors.lock").exists())
    large = start(arguments(teacher, out, 37), tmp_path / "large", pause=0.02)
    assert finish(small) == 0 and finish(large) == 0
    assert files(out) == files(whole.path)


def test_a_reader_goes_on_while_the_store_grows(build):
    store = build(n=5)
    reader = PairStore(store.path)
    before = [t.clone() for t in tensors(build("same", n=5).batch(range(5)))]
    build(n=21)
    for a, b in zip(
        tensors(reader.batch(range(5))), before
    ):  # its first look at the shard, which is another one by now
        assert torch.allclose(a, b, atol=1e-5)  # the last batch was made beside fewer others


def test_it_grows_from_several_threads_at_once(build):
    whole = build("whole", 24)
    build(n=4)
    threads = [threading.Thread(target=build, kwargs={"n": n}) for n in (9, 24, 16)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert files(build(n=24).path) == files(whole.path)
