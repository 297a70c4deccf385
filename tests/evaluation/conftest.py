"""What the tests of evaluation share: a tiny untrained extractor, and stand-ins where a shipped file would be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from d2o.evaluation import named_extractors
from d2o.evaluation.quick import cached
from tests.helpers import tiny_student, tiny_teacher
from tests.samples import make_extractor


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The name `digits` means a tiny untrained network with 16 features, whether the assets are there or not."""
    path = make_extractor(tmp_path / "classifier.safetensors")
    monkeypatch.setitem(
        named_extractors.EXTRACTORS,
        "digits",
        lambda name, weights, device: named_extractors.read_extractor("digits", path, device),
    )
    cached.cache_clear()
    yield path
    cached.cache_clear()


@pytest.fixture
def student(tmp_path: Path) -> Path:
    tiny_student(tmp_path / "student.safetensors")
    return tmp_path / "student.safetensors"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    tiny_teacher(tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"
