import errno
import os

import pytest
import torch
from safetensors.torch import save_file as foreign_save

from d2o.errors import UserError
from d2o.interop.safetensors_io import (
    atomic_path,
    atomic_write,
    file_sha256,
    load_file,
    read_meta,
    save_file,
    tensors_sha256,
)


def test_round_trip_of_tensors_and_nested_metadata(tmp_path):
    tensors = {"b": torch.arange(6).reshape(2, 3), "a": torch.randn(3).to(torch.bfloat16)}
    save_file(tmp_path / "x.safetensors", tensors, {"kind": "x", "deep": {"list": [1, 2.5, None]}})
    again, meta = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(again[k], v) for k, v in tensors.items())
    assert meta == {"kind": "x", "deep": {"list": [1, 2.5, None]}} == read_meta(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.safetensors"]


def test_foreign_files_are_named(tmp_path):
    foreign_save({"a": torch.zeros(1)}, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match="not one of d2o's"):
        read_meta(tmp_path / "f.safetensors")
    (tmp_path / "g.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="truncated or not"):
        load_file(tmp_path / "g.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    atomic_write(tmp_path / "f", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_full_disk_and_files_in_the_way_are_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*: a"):
        atomic_write(tmp_path / "file" / "below", "x")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        atomic_write(tmp_path / "new", "x")
    assert not (tmp_path / "new").exists()


def test_fingerprints_see_values_names_and_types(tmp_path):
    a = {"x": torch.zeros(2)}
    assert tensors_sha256(a) == tensors_sha256({"x": torch.zeros(2)})
    for other in (
        {"y": torch.zeros(2)},
        {"x": torch.zeros(3)},
        {"x": torch.ones(2)},
        {"x": torch.zeros(2, dtype=torch.float64)},
    ):
        assert tensors_sha256(other) != tensors_sha256(a)
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f").startswith("ba7816bf")
