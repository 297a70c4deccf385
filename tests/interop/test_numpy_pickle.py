"""Pickled numpy arrays are read as data: what numpy and torch write comes back bit for bit, and nothing else gets
in."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2o.errors import UserError
from d2o.interop.inert_pickle import Malformed
from d2o.interop.numpy_pickle import loads, pickled_keys, read_pickled
from tests.interop.nvidia_writer import Run, damage

RNG = np.random.default_rng(0)
RECORD: dict[str, Any] = {
    "num_images": 50_000,
    "fid": {"mu": RNG.normal(size=5), "sigma": np.asfortranarray(RNG.normal(size=(5, 5)))},
    "scalar": np.float64(3.5),
    "empty": np.zeros((0, 3)),
    "big endian": np.arange(3, dtype=">f4"),
    "flags": np.array([True, False]),
    "plain": (1, "a", None, True, -2.5, b"\x00\xff", b""),
    "list": [np.arange(2), np.float16(0.5)],
    "objects": np.array([None, {"a": np.arange(4, dtype=np.uint8)}], dtype=object),
}


def check(wanted: Any, found: Any) -> None:
    """`found` is what `wanted` should be read as: arrays native, object arrays as lists."""
    if isinstance(wanted, dict):
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            check(value, found[key])
    elif isinstance(wanted, list | tuple) or (isinstance(wanted, np.ndarray) and wanted.dtype == object):
        assert len(wanted) == len(found)
        for one, other in zip(wanted, found, strict=True):
            check(one, other)
    elif isinstance(wanted, np.ndarray):
        assert np.array_equal(wanted, found) and found.dtype == wanted.dtype.newbyteorder("=")
    else:
        assert type(wanted) is type(found) and wanted == found


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_what_numpy_1_and_2_pickle(protocol: int, core: bytes) -> None:
    data = pickle.dumps(RECORD, protocol)
    ours = b"numpy._core" if b"numpy._core" in data else b"numpy.core"
    other = data.replace(ours, core)
    if protocol >= 4 and core != ours:  # names are preceded by their length, and frames by theirs
        other = rename(data, ours, core)
    assert core + b"." in other
    check(RECORD, loads(other))


def rename(data: bytes, old: bytes, new: bytes) -> bytes:
    out = bytearray()
    frame = data.index(b"\x95")
    for module in (b".multiarray", b".numeric"):
        data = data.replace(
            bytes([0x8C, len(old + module)]) + old + module, bytes([0x8C, len(new + module)]) + new + module
        )
    # Frames are only a hint for readers of streams: they are taken out rather than measured anew.
    while True:
        frame = data.find(b"\x95", frame)
        if frame < 0 or not 0 <= int.from_bytes(data[frame + 1 : frame + 9], "little") < 1 << 24:
            return bytes(out + data)
        data = data[:frame] + data[frame + 9 :]


def test_files_of_numpy_and_torch(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RECORD)  # type: ignore[arg-type]  # as DD-GAN's authors did
    torch.save(RECORD, tmp_path / "a.pt")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(RECORD))
    for name in ("a.npy", "a.pt", "a.pkl"):
        check(RECORD, read_pickled(tmp_path / name))
        assert pickled_keys(tmp_path / name) == RECORD.keys()


def test_an_array_that_is_named_twice_is_one_array() -> None:
    array = np.arange(1000.0)
    found = loads(pickle.dumps([array] * 50, 4))
    assert all(other is found[0] for other in found) and np.array_equal(found[0], array)


@pytest.mark.parametrize(
    "thing",
    [
        os.system,
        Run(os.system, "true"),
        Run(eval, "1"),
        Run(open, "/dev/null"),
        np.sum,
        np.dtype("V8"),
        torch.zeros(2),
        {1j: 2},
    ],
)
def test_anything_else_is_refused(tmp_path: Path, thing: object) -> None:
    for protocol in (2, 4, 5):
        with pytest.raises(Malformed):
            loads(pickle.dumps({"mu": np.zeros(2), "sigma": thing}, protocol))
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"mu": thing}))
    with pytest.raises(UserError, match="x.pkl") as error:
        read_pickled(path)
    assert "nothing in it was executed" in error.value.hint


def test_a_malicious_pickle_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for name, write in (
        ("x.npy", lambda file, thing: np.save(file, thing)),
        ("x.pt", lambda file, thing: torch.save(thing, file)),
    ):
        write(tmp_path / name, {"mu": Run(os.mkdir, str(trap))})
        with pytest.raises(UserError, match=r"refers to '(posix|nt)\.mkdir', which has no place"):
            read_pickled(tmp_path / name)
    assert not trap.exists()


def test_lies_about_shape_and_size() -> None:
    data = pickle.dumps(np.arange(4.0), 4)
    assert loads(data).sum() == 6
    place = data.index(b"K\x04\x85")  # the shape (4,)
    with pytest.raises(Malformed, match="does not fit its shape"):
        loads(data[:place] + b"K\x05\x85" + data[place + 3 :])
    with pytest.raises(Malformed, match="truncated"):
        loads(data[:-20])
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(Malformed, match="nests them deeper"):
        loads(pickle.dumps(deep))
    loop: list = []
    loop.append(loop)
    with pytest.raises(Malformed):
        loads(pickle.dumps(loop))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.zeros((3, 2)))
    with pytest.raises(UserError, match=r"holds one array of shape \[3, 2\]"):
        read_pickled(tmp_path / "plain.npy")
    (tmp_path / "text").write_text("mu = 3")
    with pytest.raises(UserError, match="not a pickle"):
        read_pickled(tmp_path / "text")
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="not a pickle"):
        read_pickled(tmp_path / "empty")
    torch.save(
        {"mu": torch.zeros(3)}, tmp_path / "tensors.pt"
    )  # tensors lie beside the pickle: not this reader's business
    with pytest.raises(UserError):
        read_pickled(tmp_path / "tensors.pt")
    with pytest.raises(UserError, match="no such file"):
        read_pickled(tmp_path / "absent")
    assert pickled_keys(tmp_path / "absent") == set()


@pytest.mark.long
def test_damaged_files_never_raise_anything_else(tmp_path: Path) -> None:
    rng = random.Random(0)
    contents = [pickle.dumps(RECORD, protocol) for protocol in (2, 3, 4, 5)]
    np.save(tmp_path / "a.npy", RECORD)  # type: ignore[arg-type]
    torch.save(RECORD, tmp_path / "a.pt")
    contents += [(tmp_path / name).read_bytes() for name in ("a.npy", "a.pt")]
    outcomes = []
    for i in range(1200):
        (tmp_path / "x").write_bytes(damage(contents[i % len(contents)], rng))
        try:
            read_pickled(tmp_path / "x")
            outcomes.append("read")
        except UserError as error:
            assert "\n" not in error.message
            outcomes.append("refused")
        pickled_keys(tmp_path / "x")
    assert outcomes.count("refused") > 600 and outcomes.count("read") > 40
