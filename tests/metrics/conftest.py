"""What the tests of metrics share: a tiny untrained extractor, and stand-ins where a shipped file would be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2o.interop.safetensors_io import save_file
from d2o.metrics import features
from d2o.metrics.evaluate import _cached
from d2o.networks.classifier import Classifier
from d2o.students.base import checkpoint_meta


def make_extractor(path: Path, seed: int = 0, classes: int = 10, dim: int = 16) -> Path:
    torch.manual_seed(seed)
    network = Classifier(8, 1, classes, width=8, feature_dim=dim)
    save_file(path, network.state_dict(), checkpoint_meta("extractor", network.config, None))
    return path


@pytest.fixture
def extractor_file(tmp_path: Path) -> Path:
    return make_extractor(tmp_path / "tiny.safetensors")


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The name `digits` means a tiny untrained network with 16 features, whether the assets are there or not."""
    path = make_extractor(tmp_path / "classifier.safetensors")
    monkeypatch.setitem(features.EXTRACTORS, "digits", lambda device: features.read_extractor("digits", path, device))
    _cached.cache_clear()
    yield path
    _cached.cache_clear()
