"""The reader of NVIDIA's pickles: what it reads, and that nothing in a file can run, hang or eat memory.

Files are written by Python's own pickler from stand-ins for the official classes, so their structure is that of the
official ones.
"""

import copyreg
import io
import os
import pickle
import random
import struct
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from d2o.errors import UserError
from d2o.interop.inert_pickle import InertPickle
from d2o.interop.nvidia_pickle import EXPECTED, MAX_OPCODES, STORAGE, read_nvidia_pickle, read_storage
from d2o.networks.edm_unet import EDMPrecond
from d2o.teachers.registry import load_teacher
from tests.interop.nvidia_writer import EasyDict, Persistent, Run, damage, dumps, official, outcome

pytestmark = pytest.mark.usefixtures("nvidia_modules")
GOLDEN = Path(__file__).parents[1] / "golden" / "edm"
SONG = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
    "augment_dim": 9,
}
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def network(kwargs):
    """Our network for NVIDIA's arguments."""
    ours = {
        "channel_mult_noise": "noise_mult",
        "embedding_type": "embedding",
        "encoder_type": "encoder",
        "resample_filter": "fir",
    }
    arch = (
        "adm"
        if kwargs["model_type"] == "DhariwalUNet"
        else "ncsnpp"
        if kwargs.get("encoder_type") == "residual"
        else "ddpmpp"
    )
    torch.manual_seed(0)
    return EDMPrecond(arch, **{ours.get(k, k): v for k, v in kwargs.items() if k != "model_type"})


def small(state=None, root=None, **kwargs):
    """A file of 4 KB with all kinds of things in it: parameters, buffers, a container, a nested module, numpy values,
    attributes."""

    def attributes(parameters=None, buffers=None, modules=None, **more):
        return {
            "_parameters": parameters or {},
            "_buffers": buffers or {},
            "_modules": modules or {},
            "_non_persistent_buffers_set": {"b"},
            "_init_args": (),
            "_init_kwargs": {},
            **more,
        }

    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    linear = Persistent("Linear", attributes({"weight": weight, "bias": None}, scale=np.float64(0.5)))
    container = nn.ModuleDict()
    container._modules = {"8x8_in": linear}
    buffers = {"a": torch.ones(2, dtype=torch.float16), "b": torch.zeros(2), "c": torch.arange(8.0)[1:7:2]}
    top = attributes(
        buffers=buffers,
        modules={"enc": container, "skip": None},
        sigma_max=float("inf"),
        hooks={0: "x", 1: (True, 300)},
    )
    top["_init_kwargs"] = {**SONG, **kwargs}
    return {
        "ema": Persistent("EDMPrecond", {**top, **(state or {})}),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}),
        **(root or {}),
    }


def read(tmp_path, content):
    path = tmp_path / "network.pkl"
    path.write_bytes(content if isinstance(content, bytes) else dumps(content))
    return read_nvidia_pickle(path)


# What it reads


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_reads_what_the_official_code_writes(tmp_path, protocol):
    found = read(tmp_path, dumps(small(root={"dataset_kwargs": EasyDict(path="x"), "augment_pipe": None}), protocol))
    assert found.class_name == "EDMPrecond" and found.init_kwargs == SONG
    assert found.root_keys == ("ema", "loss_fn", "dataset_kwargs", "augment_pipe")
    assert list(found.state_dict) == ["a", "c", "enc.8x8_in.weight"]  # buffers before submodules; "b" is not persistent
    assert found.state_dict["a"].dtype == torch.float16 and found.state_dict["a"].tolist() == [1, 1]
    assert found.state_dict["c"].tolist() == [1, 3, 5]
    assert found.state_dict["enc.8x8_in.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not any(tensor.requires_grad for tensor in found.state_dict.values())


def test_golden_file():
    found = read_nvidia_pickle(GOLDEN / "edm-ddpmpp.pkl")
    assert found.class_name == "EDMPrecond" and set(found.root_keys) == {
        "ema",
        "loss_fn",
        "augment_pipe",
        "dataset_kwargs",
    }
    assert list(found.state_dict)[:3] == ["model.map_label.weight", "model.map_label.bias", "model.map_augment.weight"]
    assert found.config()["arch"] == "ddpmpp" and found.config()["augment_dim"] == 9


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_storages_agree_with_torch():
    """torch.load(weights_only=True) is the reference for the storages inside."""
    reader = InertPickle(memoryview((GOLDEN / "edm-adm.pkl").read_bytes()), EXPECTED, MAX_OPCODES)
    reader.load()
    storages = [call.args[0] for call in reader.calls if call.name == STORAGE][::10]
    assert len(storages) >= 15
    for blob in storages:
        raw, dtype = read_storage(blob)
        theirs = torch.load(io.BytesIO(blob), weights_only=True, map_location="cpu")
        assert dtype == theirs.dtype and bytes(raw) == bytes(theirs.untyped())


@pytest.mark.parametrize(
    "kwargs",
    [SONG, {**SONG, **NCSNPP}, {**SONG, "embedding_type": "fourier"}, {**SONG, "model_type": "DhariwalUNet"}],
    ids=["ddpmpp", "ncsnpp", "ddpmpp-fourier", "adm"],
)
def test_load_teacher_configures_the_network_from_the_file(tmp_path, kwargs):
    if kwargs["model_type"] == "DhariwalUNet":
        kwargs = {**kwargs, "model_channels": 32}  # attention has 64 channels a head
    ours = network(kwargs).eval()
    path = tmp_path / "edm-test.pkl"
    path.write_bytes(dumps({"ema": official(ours, kwargs)}))
    generator_before = torch.get_rng_state()
    teacher = load_teacher(path)
    assert torch.equal(torch.get_rng_state(), generator_before)
    spec = teacher.spec
    assert (spec.name, spec.shape, spec.condition, spec.classes) == ("edm-test", (1, 8, 8), "label", 3)
    assert spec.licence == "CC BY-NC-SA 4.0 (NVIDIA)" and teacher.meta["kind"] == "teacher"
    weights, expected = teacher.network.state_dict(), ours.state_dict()
    assert list(weights) == list(expected) and all(torch.equal(weights[name], expected[name]) for name in expected)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.inference_mode():
        assert torch.equal(teacher.denoise(x, 1.5, labels), ours(x, torch.tensor(1.5), labels))


def test_half_precision_weights_become_float32_and_no_classes_no_labels(tmp_path):
    kwargs = {**SONG, "label_dim": 0}
    path = tmp_path / "half.pkl"
    path.write_bytes(dumps({"ema": official(network(kwargs).half(), kwargs)}))
    assert {t.dtype for t in read_nvidia_pickle(path).state_dict.values()} == {torch.float16}
    teacher = load_teacher(path)
    assert teacher.spec.condition == "none" and teacher.spec.classes == 0
    assert {t.dtype for t in teacher.network.state_dict().values()} == {torch.float32}


def test_values_that_we_have_no_use_for_are_passed_over(tmp_path):
    encoder = Persistent(
        "StabilityVAEEncoder", {"scale": np.ones(4), "hook": [].append}
    )  # numpy._reconstruct and builtins.getattr
    found = read(tmp_path, small(root={"encoder": encoder}))
    assert "encoder" in found.root_keys and len(found.state_dict) == 3


# What it refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_type": "skip"}, "decoder_type = 'skip'"),
        ({"encoder_type": "skip"}, "encoder_type = 'skip'"),
        ({"model_channels": 10**9}, "model_channels = 1000000000"),
        ({"num_blocks": 10**6}, "num_blocks"),
        ({"num_blocks": "many"}, "num_blocks = 'many'"),
        ({"channel_mult": [1] * 50}, "channel_mult"),
        ({"img_resolution": None}, "img_resolution = None"),
        ({"sigma_data": float("nan")}, "sigma_data"),
        ({"new_option": 1}, "option 'new_option'"),
        ({"model_type": "VisionTransformer"}, "around 'VisionTransformer'"),
        (
            {"model_channels": 8192},
            "more tensors or numbers than the file holds",
        ),  # hundreds of gigabytes, were it built
    ],
)
def test_unsupported_or_damaged_configurations(tmp_path, change, message):
    path = tmp_path / "bad.pkl"
    path.write_bytes(dumps(small(**change)))
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ([1], "no network under 'ema'"),
        ({"model": 1}, "no network under 'ema'"),
        ({"ema": {"weight": 1}}, "no network under 'ema'"),
        ({"ema": Persistent("EDMPrecond", {}, extra=1)}, "not described as"),
        ({"ema": Persistent("EDMPrecond", {}, version=7)}, "another version"),
        ({"ema": Persistent("EDMPrecond", {}, type="function")}, "another version"),
        ({"ema": Persistent("Trojan", {})}, "class 'Trojan'"),
        ({"ema": Persistent("EDMPrecond", [])}, "damaged module"),
        (small(root={"x": Persistent("Trojan", {})}), "class 'Trojan'"),
        (small({"_modules": {"x": 5}}), "'x.', which is no module"),
        (small({"_parameters": {"w": 5}}), "damaged tensor 'w': it is no tensor"),
        (small({"_init_args": (16,)}), "does not name the options"),
    ],
)
def test_other_structures_are_refused(tmp_path, root, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, root)
    assert "network.pkl" in caught.value.message and caught.value.hint


def test_missing_and_foreign_files(tmp_path):
    for ask in (read_nvidia_pickle, load_teacher):
        with pytest.raises(UserError, match="no such file"):
            ask(tmp_path / "missing.pkl")
        with pytest.raises(UserError, match=r"folder|directory"):
            ask(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.pt")
    for content in (
        b"",
        b"\x80",
        b"\x80\x04",
        b"hello",
        b"\x80\x09.",
        pickle.dumps({}, 0),
        (tmp_path / "zip.pt").read_bytes(),
    ):
        with pytest.raises(UserError, match=r"network\.pkl"):
            read(tmp_path, content)


def tensor_call(offset, size, stride, numbers=4, blob=None):
    """A tensor with arguments that torch's pickler would not write."""
    if blob is None:
        blob = storage_blob(torch.arange(float(numbers)))
    storage = Run(torch.storage._load_from_bytes, blob)
    return small({"_parameters": {"w": Run(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})}})


def storage_blob(tensor):
    """A storage's bytes in torch's legacy format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tensor.storage().__reduce__()[1][0]


def test_tensors_stay_inside_their_storages(tmp_path):
    assert read(tmp_path, tensor_call(1, (2,), (2,))).state_dict["w"].tolist() == [1, 3]
    assert read(tmp_path, tensor_call(0, (2, 0), (1, 1))).state_dict["w"].shape == (2, 0)
    beyond = [
        (0, (5,), (1,)),
        (4, (1,), (1,)),
        (0, (2,), (4,)),
        (5, (0,), (1,)),
        (0, (2, 2), (3, 1)),
        (2**40, (1,), (1,)),
    ]
    invalid = [
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), ()),
        (0, (2**60,), (0,)),
        (0, 4, (1,)),
        (0, (1.0,), (1,)),
        (0, (1,) * 9, (1,) * 9),
    ]
    multiplied = [(0, (2**40,), (0,)), (0, (2**20, 2**20), (0, 0))]
    for cases, message in (
        (beyond, "beyond its storage"),
        (invalid, "no valid shape"),
        (multiplied, "more bytes than the file"),
    ):
        for case in cases:
            with pytest.raises(UserError, match=message):
                read(tmp_path, tensor_call(*case))


def test_storages_are_exactly_as_long_as_they_say(tmp_path):
    blob = storage_blob(torch.arange(4.0))
    assert read(tmp_path, tensor_call(0, (4,), (1,), blob=blob)).state_dict["w"].tolist() == [0, 1, 2, 3]
    changes = [
        (struct.pack("<q", 4), struct.pack("<q", 2**60)),
        (b"K\x04Nt", b"J\xff\xff\xff\x7fNt"),
        (b"FloatStorage", b"QInt8Storage"),
        (b"FloatStorage", b"HalfStorage"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        (b"\x8a\nl\xfc", b"\x8a\nl\xfd"),
    ]
    assert all(old in blob for old, _ in changes)
    for bad in (blob[:-1], blob + b"\0", b"", *(blob.replace(*change) for change in changes)):
        with pytest.raises(UserError, match="damaged tensor 'w'"):
            read(tmp_path, tensor_call(0, (4,), (1,), blob=bad))


def test_shared_storages_cannot_be_multiplied(tmp_path):
    whole = Run(
        torch._utils._rebuild_tensor_v2,
        Run(torch.storage._load_from_bytes, storage_blob(torch.zeros(50_000))),
        0,
        (50_000,),
        (1,),
        False,
        {},
    )
    with pytest.raises(UserError, match="more bytes than the file"):
        read(tmp_path, small({"_parameters": {f"w{i}": whole for i in range(2000)}}))  # 400 MB of tensors in 250 KB


# Nothing runs


def hostile(canary):
    """name -> (content, the global or opcode that the message names). Each would create `canary` when unpickled."""
    command = f"touch {canary}"
    text = pickle.dumps(command, 4)[11:-2]  # the string alone: opcode, length, characters
    code = pickle.dumps(f"open({str(canary)!r}, 'w')", 4)[11:-2]
    system = "posix.system"
    bad = Run(os.system, command)
    return {
        "reduce": (b"\x80\x04cposix\nsystem\n" + text + b"\x85R.", system),
        "stack global": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.", system),
        "inst": (b"\x80\x04(" + text + b"iposix\nsystem\n.", system),
        "obj": (b"\x80\x04(cposix\nsystem\n" + text + b"o.", system),
        "newobj": (b"\x80\x04cposix\nsystem\n" + text + b"\x85\x81.", system),
        "newobj_ex": (b"\x80\x04cposix\nsystem\n" + text + b"\x85}\x92.", system),
        "ext1": (b"\x80\x04\x82\xf0" + text + b"\x85R.", r"opcode b'\x82'"),
        "ext2": (b"\x80\x04\x83\xf0\x00" + text + b"\x85R.", r"opcode b'\x83'"),
        "ext4": (b"\x80\x04\x84\xf0\x00\x00\x00" + text + b"\x85R.", r"opcode b'\x84'"),
        "persistent id": (b"\x80\x04" + text + b"Q.", "opcode b'Q'"),
        "eval": (b"\x80\x04cbuiltins\neval\n" + code + b"\x85R.", "builtins.eval"),
        "inst of a known global": (b"\x80\x04(" + text + b"icollections\nOrderedDict\n.", "collections.OrderedDict"),
        "getattr": (
            b"\x80\x04cbuiltins\ngetattr\nccollections\nOrderedDict\n\x8c\x08__init__\x86R)R.",
            "Call where a Global belongs",
        ),
        "in the root": (dumps(small(root={"x": bad})), system),
        "in the state": (dumps(small({"x": bad})), system),
        "as a parameter": (dumps(small({"_parameters": {"w": bad}})), system),
        "as a hook": (dumps(small({"_forward_hooks": {0: [bad]}})), system),
        "as the kwargs": (dumps(small(model_channels=bad)), system),
        "as a tensor's argument": (dumps(tensor_call(bad, (4,), (1,))), system),
        "inside a storage": (
            dumps(tensor_call(0, (4,), (1,), blob=b"\x80\x02cposix\nsystem\n" + text + b"\x85R.")),
            system,
        ),
        "as source": (
            dumps({"ema": Persistent("EDMPrecond", {}, module_src=f"open({str(canary)!r}, 'w')")}),
            "damaged module",
        ),
    }


def test_nothing_is_executed(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    cases = hostile(canary)
    # os.system as an extension code, also cached: from the cache, Python's unpickler takes it past any allow-list.
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("posix", "system"))
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.system)
    for name in ("reduce", "stack global", "inst", "obj", "ext1"):  # the attacks work on Python's unpickler
        pickle.loads(cases[name][0])
        assert canary.exists(), name
        canary.unlink()
    for name, (content, named) in cases.items():
        with pytest.raises(UserError) as caught:
            read(tmp_path, content)
        assert named in caught.value.message and "\n" not in caught.value.message, name
        assert not canary.exists(), name


# Nothing hangs or eats memory


def nested(levels):
    """A list in a list in a list ..."""
    return b"]" * levels + b"a" * (levels - 1)


def doubling_tuples(levels):
    """x = (x, x), again and again: small to write, endless to hash, compare, copy or print."""
    return b"K\x01\x94" + b"".join((b"h%c" % i) * 2 + b"\x86\x94" for i in range(levels))


SIZES = {  # content, part of the message
    "deep lists": (b"\x80\x04" + nested(20_000) + b".", "no network"),
    "deep tuples": (b"\x80\x04)" + b"\x85" * 20_000 + b".", "no network"),
    "deep dicts": (b"\x80\x04" + b"}K\x01" * 10_000 + b"N" + b"s" * 10_000 + b".", "no network"),
    "deep calls": (
        b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93\x94" + b"h\x00" * 10_000 + b")" + b"R\x85" * 10_000 + b".",
        "no network",
    ),
    "deep marks": (b"\x80\x04" + b"(" * 20_000 + b".", "nothing to work on"),
    "doubling tuples as a key": (b"\x80\x04}(" + doubling_tuples(200) + b"Nu.", "a tuple that is no text"),
    "doubling tuples in a set": (b"\x80\x04\x8f(" + doubling_tuples(200) + b"\x90.", "a tuple that is no text"),
    "a huge number as a key": (b"\x80\x04}\x8a\x09" + b"\xff" * 8 + b"\x00Ns.", "a int that is no text"),
    "long bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "truncated"),
    "long text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.", "truncated"),
    "long byte array": (b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"x.", "truncated"),
    "long integer": (b"\x80\x04\x8b" + struct.pack("<I", 2**31 - 1) + b"x.", "opcode"),
    "long frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"N.", "truncated"),
    "a far memo": (b"\x80\x04}r\xff\xff\xff\xff.", "no network"),
    "an unknown memo": (b"\x80\x04j\xff\xff\xff\xff.", "no memo 4294967295"),
    "a long name": (b"\x80\x04c" + b"a" * 5_000_000 + b"\nb\n.", "no name"),
    "an empty stack": (b"\x80\x04\x86.", "nothing to work on"),
    "a list in itself": (b"\x80\x04]\x94h\x00a.", "no network"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_bounded(tmp_path, name):
    content, message = SIZES[name]
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            read(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(60)
def test_the_number_of_opcodes_is_bounded(tmp_path):
    with pytest.raises(UserError, match="more opcodes"):
        read(tmp_path, b"\x80\x04" + b"}0" * (MAX_OPCODES // 2) + b"}.")


@pytest.mark.timeout(60)
def test_references_cannot_multiply_modules(tmp_path):
    leaf = Persistent("Linear", {"_parameters": dict.fromkeys(map(str, range(1000))), "_buffers": {}, "_modules": {}})
    tree = leaf
    for _ in range(10):  # 10^10 leaves
        tree = Persistent("Block", {"_parameters": {}, "_buffers": {}, "_modules": dict.fromkeys("0123456789", tree)})
    itself = {"_parameters": {}, "_buffers": {}, "_init_kwargs": {}}
    itself["_modules"] = {"x": Persistent("Block", itself)}
    for ema in (tree, Persistent("EDMPrecond", itself)):
        ema.meta["state"]["_init_kwargs"] = {}
        with pytest.raises(UserError, match="more modules, or nests them deeper"):
            read(tmp_path, {"ema": ema})


# Damage


@pytest.mark.timeout(120)
def test_truncated_files(tmp_path):
    content = dumps(small())
    assert outcome(tmp_path / "x.pkl", content) == "read"
    for length in range(0, len(content), 17):
        assert outcome(tmp_path / "x.pkl", content[:length]) == "refused"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_or_refused(tmp_path, seed):
    content = dumps(small(), protocol=[3, 4, 4, 5][seed])
    rng = random.Random(seed)
    seen = set()
    for _ in range(120):
        seen.add(outcome(tmp_path / "x.pkl", damage(content, rng)))
    assert seen == {"read", "refused"}
