"""The pair store: what is in it, that its bytes do not depend on how it was made, and what it says about damage."""

import json
import math
import os
import signal
import stat

import numpy as np
import pytest
import torch

from d2o.data import pair_reading
from d2o.data.pair_files import store_folder
from d2o.data.pair_settings import PairSettings
from d2o.data.pair_tools import verify_store
from d2o.data.pairs import PairStore
from d2o.diffusion.noise import noise_and_labels, noise_for_seeds
from d2o.errors import UserError
from d2o.networks.edm_unet import EDMPrecond
from d2o.runtime import StopFlag, Stopped
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.work.base import dump_manifest
from tests.helpers import tiny_teacher
from tests.workers import files, finish, start, wait_for


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """(path, teacher)"""
    path = tmp_path_factory.mktemp("teacher") / "t.safetensors"
    return path, tiny_teacher(path)


@pytest.fixture
def build(teacher, tmp_path):
    """build(name, n=..., batch=..., ...) -> PairStore of the tiny teacher, 2 Euler steps, one thread."""

    def run(name="store", how=None, **settings):
        settings = {"n": 20, "solver": "euler", "steps": 2, "shard_size": 8, **settings}
        how = {"batch": 4, "threads": 1, "teacher": teacher[1], **(how or {})}
        compute = Compute(**{name: how.pop(name) for name in [*how] if name in Compute.__dataclass_fields__})
        return make_pairs(PairSettings(str(teacher[0]), **settings), tmp_path / name, compute=compute, **how)

    return run


def arguments(teacher, out, **more):
    options = {
        "n": 20,
        "solver": "euler",
        "steps": 2,
        "shard-size": 8,
        "batch": 4,
        "threads": 1,
        "device": "cpu",
        **more,
    }
    return [
        "pairs",
        "--teacher",
        teacher[0],
        "--out",
        out,
        *(word for name, value in options.items() for word in (f"--{name}", value)),
    ]


@pytest.fixture(scope="module")
def reference(teacher, tmp_path_factory):
    """The files of a store made in one go."""
    out = tmp_path_factory.mktemp("reference") / "store"
    make_pairs(
        PairSettings(str(teacher[0]), 20, solver="euler", steps=2, shard_size=8),
        out,
        compute=Compute(4, 1),
        teacher=teacher[1],
    )
    return files(out)


def test_a_pair_is_what_the_teacher_makes_of_the_seed(build, teacher):
    store = build(seed=100, solver="heun", steps=3)
    noise, labels = noise_and_labels(range(100, 120), (1, 8, 8), 10)
    assert len(store) == 20 and store.spec["classes"] == 10 and store.settings.nfe == 5
    for i in (0, 7, 19):
        z, c, x = store[i]
        assert torch.equal(z, noise[i]) and c == labels[i]
        alone = teacher[1].sample(noise[i : i + 1], labels[i : i + 1], "heun", 3)[0]
        assert x.shape == (1, 8, 8) and torch.allclose(x, alone, atol=1e-4)


@pytest.mark.parametrize("store_noise", [True, False])
def test_a_batch_is_its_pairs(build, store_noise):
    store = PairStore(build(store_noise=store_noise).path)
    index = [3, 19, 3, 8, -20]
    noise, condition, target = store.batch(index)
    labels = condition.labels
    for row, i in enumerate(index):
        z, c, x = store[i]
        assert torch.equal(noise[row], z) and labels[row] == c and torch.equal(target[row], x)
    assert [t.dtype for t in (noise, labels, target)] == [torch.float32, torch.int64, torch.float32]
    assert torch.equal(store.batch(np.array(index))[2], store.batch(torch.tensor(index))[2])
    assert torch.equal(store.batch(range(20))[0], noise_for_seeds(range(20), (1, 8, 8)))
    assert len(store.batch([])[0]) == 0
    assert torch.equal(store[-1][2], store[19][2])
    for wrong in (20, -21):
        with pytest.raises(IndexError):
            store[wrong]
        with pytest.raises(IndexError, match="20 pairs"):
            store.batch([0, wrong])


def test_other_batch_sizes_and_shards_give_the_same_values(build):
    ours = build().batch(range(20))
    for name, how, more in (
        ("a", {"batch": 20}, {"shard_size": 20}),
        ("b", {"batch": 3}, {"shard_size": 7}),
        ("c", {"batch": 1}, {}),
    ):
        other = build(name, how, **more).batch(range(20))
        assert torch.equal(ours[0], other[0]) and torch.equal(ours[1].labels, other[1].labels)
        assert torch.allclose(ours[2], other[2], atol=1e-4)


@pytest.mark.parametrize(
    "die_in, die_at", [("compute", 4), ("replace", 2), ("replace", 3), ("record", 1), ("record", 2)]
)
def test_bytes_are_the_same_after_a_kill(teacher, reference, tmp_path, die_in, die_at):
    out = tmp_path / "store"
    assert finish(start(arguments(teacher, out), tmp_path / "log", die_in=die_in, die_at=die_at)) == -signal.SIGKILL
    with pytest.raises(UserError, match=r"not finished: . of 3 shards are missing"):
        PairStore(out)
    settings = PairSettings(str(teacher[0]), 20, solver="euler", steps=2, shard_size=8)
    store = make_pairs(settings, out, teacher=teacher[1], compute=Compute(5, 2))  # what was recorded holds, not these
    assert files(out) == reference and store.verify() == []


def test_bytes_are_the_same_from_two_workers_one_of_them_killed(teacher, reference, tmp_path):
    out = tmp_path / "store"
    first = start(arguments(teacher, out), tmp_path / "first", pause=0.1)
    wait_for(lambda: (out / ".locks" / "shard-00000.safetensors.lock").exists())
    second = start(arguments(teacher, out), tmp_path / "second", pause=0.05)
    wait_for(lambda: (out / ".locks" / "shard-00001.safetensors.lock").exists())  # they work on different shards
    first.kill()
    assert finish(second) == 0
    assert files(out) == reference


def test_workers_that_start_and_end_together(teacher, reference, tmp_path):
    out = tmp_path / "store"
    workers = [start(arguments(teacher, out), tmp_path / f"log{i}", pause=0.02) for i in range(3)]
    assert [finish(worker) for worker in workers] == [0, 0, 0]
    assert files(out) == reference


def test_a_stop_signal_saves_the_work_and_says_how_to_continue(teacher, reference, tmp_path):
    out = tmp_path / "store"
    process = start(arguments(teacher, out), tmp_path / "log", pause=0.1)
    wait_for(lambda: (out / "shard-00000.safetensors").exists())
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 143
    said = (tmp_path / "log").read_text()
    assert (
        "stopped with 8 of 20 pairs" in said and "to continue: d2o pairs --teacher" in said and "Traceback" not in said
    )
    assert not list(out.glob("shard-00002*"))
    assert finish(start(arguments(teacher, out), tmp_path / "log")) == 0
    assert files(out) == reference


def test_a_stop_within_a_shard_drops_it(build, tmp_path):
    flag = StopFlag()

    def progress(done, total, note):
        flag.received = signal.SIGINT if done >= 12 else 0

    with pytest.raises(Stopped, match="stopped with 8 of 20 pairs") as stopped:
        build(how={"progress": progress, "stop": flag})
    assert stopped.value.exit_code == 130
    assert sorted(p.name for p in (tmp_path / "store").glob("shard*")) == ["shard-00000.safetensors"]


def test_a_finished_store_is_left_alone(build, teacher, monkeypatch):
    store = build()
    before = {p: p.stat().st_mtime_ns for p in store.path.iterdir()}
    monkeypatch.setattr(Teacher, "sample", None)
    said = []
    build(how={"say": said.append})
    assert any("holds all 20 pairs already; nothing to do" in line for line in said)
    assert {p: p.stat().st_mtime_ns for p in store.path.iterdir()} == before


def test_the_recorded_batch_and_threads_hold(build):
    said = []
    build(how={"batch": 4, "threads": 2})
    (build().path / "shard-00001.safetensors").unlink()
    store = build(how={"batch": 8, "threads": 1, "say": said.append})
    assert said[0].endswith("was begun with batch 4, threads 2; it goes on with that")
    assert store.manifest["compute"]["batch"] == 4 and store.verify() == []
    said.clear()
    build(how={"batch": None, "threads": None, "say": said.append})
    assert not any("was begun" in line for line in said)


def test_a_store_of_another_device_is_read_but_not_continued(build):
    store = build()
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["compute"].update(device="cuda", processor="NVIDIA H200")
    (store.path / "manifest.json").write_text(dump_manifest(manifest))
    assert len(build()) == 20
    (store.path / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match="was begun on cuda; this would go on with cpu"):
        build()


def test_another_torch_is_mentioned(build):
    store, said = build(), []
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["compute"]["torch"] = "1.0"
    (store.path / "manifest.json").write_text(dump_manifest(manifest))
    (store.path / "shard-00001.safetensors").unlink()
    build(how={"say": said.append})
    assert "was begun with torch 1.0 (here" in said[0] and "last digits" in said[0]


def test_other_settings_are_refused_by_name(build, tmp_path):
    build()
    with pytest.raises(UserError) as error:
        build(
            n=21,
            seed=5,
            solver="heun",
            steps=3,
            cfg=2.0,
            labels="balanced",
            shard_size=4,
            dtype="bf16",
            store_noise=True,
        )
    assert "n: 20" not in error.value.message  # a store may grow
    for text in (
        "seed: 0 -> 5",
        "solver: euler -> heun",
        "steps: 2 -> 3",
        "cfg: 1.0 -> 2.0",
        "labels: random -> balanced",
        "shard_size: 8 -> 4",
        "dtype: fp32 -> bf16",
        "store_noise: False -> True",
    ):
        assert text in error.value.message
    other = tiny_teacher(tmp_path / "other.safetensors", seed=3)
    with pytest.raises(UserError, match=r"teacher: .* \(weights [0-9a-f]{12} -> [0-9a-f]{12}\)") as error:
        build(how={"teacher": other})
    assert "steps" not in error.value.message


def test_the_same_weights_under_another_name_continue_the_store(build, teacher, tmp_path):
    store = build()
    (tmp_path / "copy.safetensors").write_bytes(teacher[0].read_bytes())
    again = make_pairs(
        PairSettings(str(tmp_path / "copy.safetensors"), 20, solver="euler", steps=2, shard_size=8), store.path
    )
    assert again.fingerprint == store.fingerprint


def test_foreign_folders_and_manifests_are_refused_untouched(build, tmp_path):
    out = tmp_path / "store"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds files that are not of a d2o-pairs folder \(thesis.tex\)"):
        build()
    assert files(out) == {"thesis.tex": b"x"}
    for text, message in (
        ("{", "damaged"),
        ("{}", "does not belong"),
        ('{"format": "d2o-pairs", "shards": [], "version": 2}', "version 2"),
    ):
        (out / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            build()
        with pytest.raises(UserError, match=message):
            PairStore(out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        build("file")
    with pytest.raises(UserError, match="a part of the path is a file"):
        build("file/store")
    with pytest.raises(UserError, match="is not a pair store"):
        PairStore(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n": 0}, "n must be at least 1"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32 - 19}, "seed and seed"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"cfg": math.nan}, "cfg must be a number"),
        ({"solver": "hern"}, "did you mean 'heun'"),
        ({"dtype": "fp8"}, "unknown dtype"),
        ({"labels": "cats"}, "expected random, balanced, or class indices"),
        ({"labels": "1,10"}, "class 10 is out of range"),
        ({"how": {"batch": 0}}, "batch must be at least 1"),
        ({"how": {"batch": -1}}, "batch must be at least 1"),
        ({"how": {"threads": -2}}, "threads must be at least 1"),
    ],
)
def test_bad_settings_create_nothing(build, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)
    assert not (tmp_path / "store").exists()


def test_verify_names_the_bad_shard_and_the_same_command_repairs(build, reference):
    store = build()
    path = store.path / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    assert store.verify() == ["shard-00001.safetensors: its checksum differs from the manifest's"]
    path.unlink()
    assert verify_store(store.path) == ["shard-00001.safetensors: missing"]
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        PairStore(store.path)
    said = []
    build(how={"say": said.append})
    assert "1 shards are missing or cut short" in said[0]
    assert files(store.path) == reference

    path.write_bytes(bytes(data[:-10]))
    assert "bytes instead of" in verify_store(store.path)[0]
    build()
    assert files(store.path) == reference


def test_no_flipped_bit_of_a_shard_is_used(build, monkeypatch):
    monkeypatch.setattr(pair_reading, "PATIENCE", 1)
    store = build(n=4, shard_size=4)
    path = store.path / "shard-00000.safetensors"
    before, time = path.read_bytes(), path.stat().st_mtime_ns
    for i, at in enumerate(range(0, len(before), 13)):
        data = bytearray(before)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(data))
        os.utime(path, ns=(time, time + 10**9 * (i + 1)))  # a clock's tick may be longer than this loop
        with pytest.raises(
            UserError,
            match=r"shard-00000.safetensors is damaged: its checksum(.|\n)*to repair: delete it, and run: d2o pairs",
        ):
            PairStore(store.path).batch([0])


def test_changed_random_numbers_are_noticed(build):
    store = build()
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["shards"][2]["noise_sha256"] = "0" * 64
    (store.path / "manifest.json").write_text(dump_manifest(manifest))
    assert len(verify_store(store.path)) == 1 and "its noise" in verify_store(store.path)[0]
    manifest["noise_probe"][1] += 1e-6  # rounding of another processor
    (store.path / "manifest.json").write_text(dump_manifest(manifest))
    PairStore(store.path)
    manifest["noise_probe"][1] += 0.01
    (store.path / "manifest.json").write_text(dump_manifest(manifest))
    with pytest.raises(UserError, match="draws other noise"):
        PairStore(store.path)
    with pytest.raises(UserError, match="draws other noise"):
        build()


def test_a_shard_of_another_store_is_not_adopted(build, reference):
    other = build("other", seed=1)
    store = build()
    for entry in ("shard-00000.safetensors", "shard-00002.safetensors"):
        (store.path / entry).write_bytes((other.path / entry).read_bytes()[:-1])
    build()
    assert files(store.path) == reference


def test_label_modes(build):
    random, balanced, cycle = (build(mode, labels=mode) for mode in ("random", "balanced", "7, 2"))
    assert torch.equal(random.batch(range(20))[1].labels, noise_and_labels(range(20), (1, 8, 8), 10)[1])
    assert balanced.batch(range(20))[1].labels.tolist() == [*range(10)] * 2
    assert cycle.batch(range(20))[1].labels.tolist() == [7, 2] * 10 and cycle.settings.labels == "7,2"
    assert torch.equal(random.batch([4])[0], cycle.batch([4])[0])


def test_an_unconditional_teacher(tmp_path):
    torch.manual_seed(0)
    network = EDMPrecond(
        "ddpmpp", 8, 1, 0, model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0
    )
    teacher = Teacher(network, Spec(name="plain", shape=(1, 8, 8)))
    store = make_pairs(PairSettings("plain", 5, steps=2, solver="euler"), tmp_path / "s", teacher=teacher)
    assert store[0][1] is None and store.batch([1, 2])[1].labels is None and store.settings.labels == "none"
    with pytest.raises(UserError, match="takes no labels"):
        make_pairs(PairSettings("plain", 5, labels="balanced"), tmp_path / "t", teacher=teacher)
    with pytest.raises(UserError, match="takes none"):
        make_pairs(PairSettings("plain", 5, cfg=2), tmp_path / "t", teacher=teacher)


def test_guidance(build, teacher):
    store = build(cfg=3.0, n=4)
    noise, condition, target = store.batch(range(4))
    labels = condition.labels
    assert torch.allclose(target, teacher[1].sample(noise, labels, "euler", 2, cfg=3.0), atol=1e-4)
    assert not torch.allclose(target, teacher[1].sample(noise, labels, "euler", 2), atol=1e-2)
    assert (store.settings.nfe, store.settings.forwards) == (2, 4)


@pytest.mark.parametrize("dtype, error", [("fp16", 2e-3), ("bf16", 2e-2)])
def test_number_formats(build, dtype, error):
    exact, short = build("exact"), build("short", dtype=dtype)
    assert sum(p.stat().st_size for p in short.path.glob("shard*")) < sum(
        p.stat().st_size for p in exact.path.glob("shard*")
    )
    a, b = exact.batch(range(20))[2], short.batch(range(20))[2]
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    assert torch.allclose(a, b, rtol=error, atol=error)


def test_values_that_are_not_finite_are_refused_with_their_seed(build, teacher, monkeypatch, tmp_path):
    sample = Teacher.sample

    def broken(self, noise, *rest, **more):
        x = sample(self, noise, *rest, **more).clone()
        x[noise[:, 0, 0, 0] == noise_for_seeds([1013], (1, 8, 8))[0, 0, 0, 0]] = bad
        return x

    monkeypatch.setattr(Teacher, "sample", broken)
    bad = math.inf
    with pytest.raises(UserError, match="not finite for seed 1013"):
        build(seed=1000)
    bad = 1e6
    build("wide", seed=1000)
    with pytest.raises(UserError, match="not finite for seed 1013") as error:
        build("narrow", seed=1000, dtype="fp16")
    assert "fp16 too narrow" in error.value.hint


def test_a_full_disk_is_one_line_and_the_store_goes_on_later(build, reference, monkeypatch):
    real, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += stat.S_ISREG(os.fstat(handle).st_mode)
        if calls == 4:  # manifest, shard 0, manifest, shard 1
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*: the disk is full"):
        build()
    monkeypatch.setattr(os, "fsync", real)
    assert files(build().path) == reference


def test_settings_in_words_and_back(tmp_path):
    settings = PairSettings("digits", 7, seed=3, cfg=2.5, labels="1,2", store_noise=True, dtype="bf16", steps=4)
    manifest = {"settings": settings.to_dict()}
    assert PairSettings.from_manifest(manifest) == settings and (settings.nfe, settings.forwards) == (7, 14)
    assert (
        settings.command("my pairs")
        == "d2o pairs --teacher digits --n 7 --out 'my pairs' --seed 3 --steps 4 --cfg 2.5 --labels 1,2 --dtype bf16"
        " --store-noise"
    )
    assert PairSettings("digits", 7).command("p") == "d2o pairs --teacher digits --n 7 --out p"


def test_the_fingerprint_follows_the_content(build):
    one, same, other = build("one"), build("same"), build("other", seed=1)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_locks_and_temporary_files_are_gone_at_the_end(build):
    store = build()
    assert sorted(files(store.path)) == ["manifest.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    assert store_folder(store.path).left(store.settings.units()) == []
