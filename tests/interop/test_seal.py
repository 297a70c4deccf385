"""Whatever byte of a file changes, reading it is refused; files from before there were seals are still read."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file as plain_save

from d2o.errors import UserError
from d2o.interop.safetensors_io import check_file, file_sha256, load_file, read_meta, save_file
from d2o.runtime import TRUST

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([True, False])}
META = {"kind": "x", "text": 'sp\u00e9cial "quotes"', "more": {"sha256": "0" * 64}}


@pytest.fixture
def path(tmp_path):
    save_file(tmp_path / "x.safetensors", TENSORS, META)
    return tmp_path / "x.safetensors"


def test_the_seal_does_not_show_in_what_is_read(path):
    tensors, meta = load_file(path)
    assert meta == read_meta(path) == META and torch.equal(tensors["a"], TENSORS["a"])


def test_saving_returns_the_digest_of_the_file(path, tmp_path):
    assert save_file(tmp_path / "y.safetensors", TENSORS, META) == file_sha256(path)


def test_every_single_flipped_bit_is_noticed(path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in random.Random(place).sample(range(8), 2):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"x\.safetensors"):
                load_file(path)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:200], lambda b: b""])
def test_longer_and_shorter_files_are_refused_without_reading_them(path, change):
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match="damaged|truncated"):
        read_meta(path)


def test_trust_reads_a_damaged_file_and_says_nothing(path, monkeypatch):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"sha256\)\n.*--trust"):
        check_file(path)
    monkeypatch.setenv(TRUST, "1")
    assert not torch.equal(load_file(path)[0]["b"], TENSORS["b"])


def test_files_without_a_seal_are_read_and_half_a_seal_is_none(tmp_path):
    plain_save(TENSORS, tmp_path / "old.safetensors", {"d2o": json.dumps({"kind": "old"})})
    assert load_file(tmp_path / "old.safetensors")[1] == {"kind": "old"}
    plain_save(TENSORS, tmp_path / "half.safetensors", {"d2o": json.dumps({"file_sha256": "0" * 64})})
    with pytest.raises(UserError, match="part of its seal"):
        load_file(tmp_path / "half.safetensors")


def test_a_record_that_is_no_object_is_refused(tmp_path):
    plain_save(TENSORS, tmp_path / "list.safetensors", {"d2o": "[1]"})
    with pytest.raises(UserError, match="not a record"):
        read_meta(tmp_path / "list.safetensors")
