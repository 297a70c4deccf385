"""Statistics files: our own read back, other tools' accepted, other extractors' refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2o.errors import UserError
from d2o.metrics.statistics import Statistics, is_statistics, load_statistics, save_statistics


def some(dim: int = 4, **more) -> Statistics:
    return Statistics(torch.arange(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64), **more)


def test_round_trip_with_equal_bytes(tmp_path: Path) -> None:
    s = some(n=123, feature="digits", resize="none", weights_sha256="ab" * 32, tool_version="0.1")
    save_statistics(tmp_path / "a.npz", s)
    save_statistics(tmp_path / "b.npz", s)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read = load_statistics(tmp_path / "a.npz")
    assert (read.n, read.feature, read.resize, read.weights_sha256, read.tool_version) == (123, "digits", "none", "ab" * 32, "0.1")
    assert torch.equal(read.mu, s.mu) and torch.equal(read.sigma, s.sigma) and read.distance(s) == pytest.approx(0, abs=1e-9)


def test_files_of_other_tools(tmp_path: Path) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=np.zeros(4), sigma=np.eye(4))
    assert is_statistics(tmp_path / "edm.npz") and not is_statistics(tmp_path / "adm.npz")  # a batch of images that also has statistics
    read = load_statistics(tmp_path / "edm.npz")
    assert read.n is None and read.feature == "" and not read.rank_deficient
    assert read.distance(some()) == pytest.approx(0 + 1 + 4 + 9)


def test_statistics_of_another_extractor_are_refused() -> None:
    one = some(feature="a", weights_sha256="1" * 64)
    with pytest.raises(UserError, match=r"4 features.*5 features"):
        one.distance(some(5))
    with pytest.raises(UserError, match="another extractor: a with weights 111111111111"):
        one.distance(some(feature="a", weights_sha256="2" * 64))
    with pytest.raises(UserError, match="another extractor: a and b"):
        one.distance(some(feature="b"))
    assert one.distance(some()) == pytest.approx(0, abs=1e-9)  # a file that says nothing is taken at its dimension


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a zip", "cannot be read"), ({"mu": np.zeros(3)}, "need mu and sigma"), ({"mu": np.zeros(3), "sigma": np.eye(4)}, "shape")],
)
def test_damaged_files(tmp_path: Path, content: bytes | dict, message: str) -> None:
    path = tmp_path / "x.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match=message):
        load_statistics(path)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match="cannot be read"):
        load_statistics(tmp_path / "x.npz")
    with pytest.raises(UserError, match="no such file"):
        load_statistics(tmp_path / "absent.npz")
