"""Files from before there were digests are read, continued and added to (tests/fixtures/unsealed)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from d2o.cli.app import main
from d2o.data.images import open_images
from d2o.data.pair_settings import PairSettings
from d2o.data.pair_tools import stats
from d2o.data.pairs import PairStore
from d2o.students.base import load_student
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.teachers.registry import load_teacher
from tests.helpers import tensors

FIXTURE = Path(__file__).parent.parent / "fixtures" / "unsealed"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "old")
    return tmp_path / "old"


def test_checkpoints_and_stores_are_read(old):
    assert load_student(old / "student.safetensors").spec.shape == (1, 4, 4)
    store, teacher = PairStore(old / "pairs"), load_teacher(old / "teacher.safetensors")
    assert store.verify() == [] and stats(old / "pairs")["pairs"] == 5
    noise, condition, target = store.batch(range(5))
    labels = condition.labels
    assert torch.allclose(teacher.sample(noise, labels, "euler", 2), target, atol=1e-4)


def test_a_store_grows_and_is_sealed_then(old, tmp_path):
    before = PairStore(old / "pairs").batch(range(5))
    settings = PairSettings(str(old / "teacher.safetensors"), 9, solver="euler", steps=2, shard_size=4)
    store = make_pairs(settings, old / "pairs", compute=Compute(2, 1))
    assert len(store) == 9 and store.verify() == []
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(tensors(store.batch(range(5))), tensors(before)))
    assert (FIXTURE / "pairs" / "shard-00000.safetensors").read_bytes() == (
        old / "pairs" / "shard-00000.safetensors"
    ).read_bytes()
    assert len(json.loads((old / "pairs" / "manifest.json").read_text())["sha256"]) == 64


def test_samples_are_added_to(old, capsys):
    with pytest.raises(SystemExit) as done:
        main(
            [
                "sample",
                str(old / "student.safetensors"),
                "--n",
                "7",
                "--out",
                str(old / "x.zip"),
                "--threads",
                "1",
                "--device",
                "cpu",
            ]
        )
    assert done.value.code == 0 and "grows to 7 images" in capsys.readouterr().err.replace("\n", " ")
    was, now = open_images(FIXTURE / "x.zip"), open_images(old / "x.zip")
    assert len(now) == 7 and torch.equal(now.images(range(4)), was.images(range(4)))
