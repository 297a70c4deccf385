"""What files say of themselves is input: wrong types, missing keys and sizes beyond what they hold are refused before
anything is allocated."""

import copy
import json
import resource

import pytest
import torch

import d2o
from d2o.data.pair_settings import PairSettings
from d2o.data.pairs import PairStore
from d2o.errors import UserError
from d2o.evaluation.named_extractors import load_extractor
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import load_file, save_file
from d2o.networks import budget
from d2o.networks.build import build_network
from d2o.networks.latent import load_autoencoder
from d2o.students.base import load_student
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.work.base import content_sha256, dump_manifest
from tests.helpers import tiny_student, tiny_teacher

HUGE = 2**40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """rewrite(change) -> path of the tiny student's checkpoint, with metadata that `change(meta)` has changed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_student(folder / "s.safetensors")
    tensors, meta = load_file(folder / "s.safetensors")

    def rewrite(change):
        changed = copy.deepcopy(meta)
        change(changed)
        save_file(folder / "changed.safetensors", tensors, changed)
        return folder / "changed.safetensors"

    return rewrite


def put(where, value):
    """A change of what lies at "a.b.c"."""
    *path, last = where.split(".")

    def change(record):
        for key in path:
            record = record[int(key)] if isinstance(record, list) else record[key]
        record[last] = value

    return change


def drop(where):
    *path, last = where.split(".")

    def change(record):
        for key in path:
            record = record[key]
        del record[last]

    return change


@pytest.fixture
def little_memory():
    """Nothing in the test may take more than 2 GiB beyond what the process has."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


SIZES = [
    ("num_blocks", HUGE),
    ("num_blocks", 2**20),
    ("num_blocks", 3),
    ("model_channels", HUGE),
    ("model_channels", 2**20),
    ("img_resolution", HUGE),
    ("img_channels", 2**20),
    ("label_dim", HUGE),
    ("label_dim", 2**20),
    ("channel_mult", [2**20]),
    ("channel_mult", [1] * 500),
    ("channel_mult", [1] * 15),
    ("num_blocks", 10**400),
]


@pytest.mark.parametrize("key, value", SIZES)
def test_a_network_larger_than_its_file_is_refused_before_it_is_made(checkpoint, little_memory, key, value):
    path = checkpoint(put(f"network.{key}", value))
    with pytest.raises(UserError) as error:
        load_student(path)
    assert str(path) in error.value.message


TYPES = [
    (put("network", "ddpmpp"), "network: expected a section"),
    (put("network", None), "network"),
    (drop("network"), "network: missing"),
    (put("network.arch", 7), "arch"),
    (put("network.arch", HUGE), "arch"),
    (drop("network.arch"), "arch"),
    (put("network.channel_mult", "ab"), "cannot build"),
    (put("network.num_blocks", "many"), "network.num_blocks: expected an integer"),
    (put("network.num_blocks", 1.5), "num_blocks: expected an integer"),
    (put("network.num_blocks", None), "num_blocks: expected"),
    (put("network.attn_resolutions", 8), "cannot build"),
    (put("network.dropout", "x"), "network.dropout: expected a number"),
    (put("network.sigma_data", float("nan")), "sigma_data: expected a finite"),
    (drop("spec"), "spec: missing"),
    (put("spec", []), "spec"),
    (put("spec.shape", [1, 8]), "spec.shape: expected a list of 3"),
    (put("spec.shape", [1, "8", 8]), r"spec.shape\[1\]: expected an integer"),
    (put("spec.shape", [1, HUGE, 8]), "spec.shape"),
    (put("spec.shape", [1, 2**20, 2**20]), "at most 67,108,864 numbers"),
    (put("spec.classes", HUGE), "spec.classes"),
    (put("spec.sigma_max", "80"), "spec.sigma_max: expected a number"),
    (put("spec.sigma_max", float("nan")), "sigma_max"),
    (put("spec.steps", HUGE), "spec.steps"),
    (put("spec.foreign", 1), r"tensors describes its generator by foreign, which"),
    (drop("student"), "student: missing"),
    (put("student", 3), "student"),
    (drop("student.sigma"), "sigma: missing"),
    (put("student.sigma", [80]), "sigma"),
    (put("student.sigma", float("inf")), "sigma"),
    (put("student.kind", "dream"), "kind of student"),
    (put("student", {"kind": "multistep", "steps": HUGE}), "steps"),
    (put("teacher", "someone"), "teacher: expected a section"),
    (put("teacher.name", 3), "teacher.name: expected a text"),
    (put("recipe", "x"), "recipe"),
    (put("provenance", {}), "provenance"),
    (put("images", -1), "images"),
    (put("version", 2), "version"),
]


@pytest.mark.parametrize("change, message", TYPES)
def test_metadata_of_wrong_types_is_refused_by_file_and_key(checkpoint, little_memory, change, message):
    path = checkpoint(change)
    with pytest.raises(UserError, match=message):
        load_student(path)


def test_every_kind_of_file_is_checked(tmp_path):
    tensors, meta = load_file(asset("classifier_digits.safetensors"))
    save_file(tmp_path / "c.safetensors", tensors, {**meta, "network": {**meta["network"], "feature_dim": 2**20}})
    with pytest.raises(UserError, match="more tensors or numbers than the file holds|do not fit"):
        load_extractor(str(tmp_path / "c.safetensors"))
    save_file(
        tmp_path / "a.safetensors", {"x": torch.zeros(3)}, {"kind": "autoencoder", "network": {"block_out_channels": 5}}
    )
    with pytest.raises(UserError, match="cannot build a Autoencoder|cannot build"):
        load_autoencoder(tmp_path / "a.safetensors")
    save_file(
        tmp_path / "b.safetensors",
        {"x": torch.zeros(3)},
        {"kind": "autoencoder", "network": {"layers_per_block": 2**20}},
    )
    with pytest.raises(UserError, match="more tensors or numbers than the file holds"):
        load_autoencoder(tmp_path / "b.safetensors")
    tiny_teacher(tmp_path / "t.safetensors")
    tensors, meta = load_file(tmp_path / "t.safetensors")
    save_file(tmp_path / "t.safetensors", tensors, {**meta, "network": {**meta["network"], "num_blocks": HUGE}})
    with pytest.raises(UserError, match="num_blocks: expected an integer of at most"):
        d2o.load_teacher(tmp_path / "t.safetensors")


def test_a_network_that_a_user_types_has_limits_too(little_memory, monkeypatch):
    monkeypatch.setattr(budget, "MAX_TENSORS", 500)
    for config, message in (
        ({"num_blocks": 10**12}, "network.num_blocks: expected an integer of at most"),
        ({"num_blocks": 2**20}, "more tensors or numbers than d2o builds"),
        ({"model_channels": 2**16, "channel_mult": [1], "num_blocks": 1}, "this machine has"),
    ):
        with pytest.raises(UserError, match=message):
            build_network({"arch": "ddpmpp", "img_resolution": 8, "img_channels": 1, **config})


def test_trying_a_network_out_draws_no_random_numbers():
    config = {
        "arch": "ddpmpp",
        "img_resolution": 8,
        "img_channels": 1,
        "model_channels": 16,
        "channel_mult": [1],
        "num_blocks": 1,
    }
    torch.manual_seed(3)
    first = build_network(config).state_dict()
    from d2o.networks.edm_unet import EDMPrecond

    torch.manual_seed(3)
    second = EDMPrecond("ddpmpp", 8, 1, model_channels=16, channel_mult=[1], num_blocks=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in second)


# Manifests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    teacher = tiny_teacher(folder / "t.safetensors")
    return make_pairs(
        PairSettings("t", 6, solver="euler", steps=2, shard_size=4),
        folder / "store",
        compute=Compute(4, 1),
        teacher=teacher,
    )


@pytest.fixture
def manifest(store):
    """rewrite(change): the store's manifest changed, with a digest that fits. It is put back."""
    path = store.path / "manifest.json"
    before = path.read_text()

    def rewrite(change):
        record = {key: value for key, value in json.loads(before).items() if key != "sha256"}
        change(record)
        path.write_text(dump_manifest(record))

    yield rewrite
    path.write_text(before)


MANIFESTS = [
    (put("settings.n", HUGE), "settings.n"),
    (put("settings.n", "6"), "settings.n: expected an integer"),
    (put("settings.n", 2**32), "files"),
    (put("settings.shard_size", 0), "shard_size"),
    (put("settings.shard_size", 3), "no shard of this store"),
    (put("settings.steps", 1.5), "settings.steps"),
    (drop("settings.steps"), "settings.steps: missing"),
    (drop("settings"), "settings: missing"),
    (put("settings.dtype", "fp8"), "settings.dtype"),
    (put("settings.labels", 3), "settings.labels"),
    (put("settings.cfg", float("nan")), "settings.cfg"),
    (put("settings.store_noise", "yes"), "settings.store_noise"),
    (put("spec.shape", [HUGE, 8, 8]), "spec.shape"),
    (put("spec.shape", [64, 1024, 1024]), "cannot hold"),
    (put("spec.shape", [1, 8, 90]), "cannot hold"),
    (put("spec", None), "spec"),
    (put("spec.classes", HUGE), "spec.classes"),
    (put("teacher.sha256", 5), "teacher.sha256"),
    (drop("teacher"), "teacher: missing"),
    (put("compute.batch", -1), "compute.batch"),
    (put("compute.threads", HUGE), "compute.threads"),
    (drop("compute.torch"), "compute.torch"),
    (put("noise_probe", "x"), "noise_probe"),
    (put("noise_probe", []), "noise_probe: expected 8 numbers"),
    (put("shards", {}), "does not belong"),
    (put("shards", [3]), "names no finished"),
    (put("shards.0.n", HUGE), "no finished|shards"),
    (put("shards.0.bytes", 10), "cannot hold"),
    (put("shards.0.sha256", "xyz"), "sha256"),
    (put("shards.0.file", "../../etc/passwd"), "shards"),
    (put("shards.1.file", "shard-00000.safetensors"), "twice|no shard"),
    (put("prompts", {"path": "p", "sha256": "0", "count": 3}), "prompts"),
    (put("format", "x"), "does not belong"),
    (put("version", "1"), "version"),
    (put("unknown", 1), "unknown key"),
]


@pytest.mark.parametrize("change, message", MANIFESTS)
def test_manifests_of_wrong_types_are_refused_by_key(store, manifest, little_memory, change, message):
    manifest(change)
    with pytest.raises(UserError, match=message):
        PairStore(store.path)
    with pytest.raises(UserError, match=message):
        make_pairs(
            PairSettings("t", 6, solver="euler", steps=2, shard_size=4),
            store.path,
            compute=Compute(4, 1),
            teacher=tiny_teacher(),
        )


@pytest.mark.long
def test_no_flipped_bit_of_a_manifest_is_used(store):
    path = store.path / "manifest.json"
    before = path.read_bytes()
    said = {key: value for key, value in json.loads(before).items() if key != "sha256"}
    refused = 0
    try:
        for at in range(len(before)):
            data = bytearray(before)
            data[at] ^= 1 << (at % 8)
            path.write_bytes(bytes(data))
            try:
                assert store.folder.manifest() == said  # a blank that is another blank now, or the digest's own name
            except UserError:
                refused += 1
            except AssertionError:
                with pytest.raises(UserError):  # the name of the digest: the model misses nothing and knows all
                    PairStore(store.path)
                refused += 1
        assert refused > 0.9 * (len(before) - before.count(b" ") - before.count(b"\n"))
        path.write_text(json.dumps(said))  # one from before there were digests
        assert len(PairStore(store.path)) == 6
    finally:
        path.write_bytes(before)


def test_trust_reads_a_manifest_whose_digest_is_another(store, manifest, monkeypatch):
    manifest(put("teacher.licence", "none"))
    path = store.path / "manifest.json"
    path.write_text(path.read_text().replace('"licence": "none"', '"licence": "some"'))
    with pytest.raises(UserError, match="its content is not what was written"):
        PairStore(store.path)
    monkeypatch.setenv("D2O_TRUST", "1")
    assert len(PairStore(store.path)) == 6


def test_settings_that_a_manifest_does_not_name_are_the_default(store, manifest):
    manifest(drop("settings.dtype"))
    assert PairStore(store.path).batch([0])[2].dtype == torch.float32


def test_the_digest_does_not_depend_on_how_the_record_is_written():
    assert content_sha256({"a": 1, "b": [1.5, None]}) == content_sha256({"b": [1.5, None], "a": 1, "sha256": "x"})
