"""`d2o env`: what a bug report needs, and nothing that should not be in one."""

from __future__ import annotations

import json
import sys

import pytest

from d2o import __version__
from d2o.cli import environment
from d2o.cli.app import main


def told(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as done:
        main(["env", *words])
    assert done.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "jane"))
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "jane" / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "jane" / "cache" / "weights").mkdir(parents=True)
    (tmp_path / "jane" / "cache" / "weights" / "x.pt").write_bytes(b"x" * 3000)
    return tmp_path / "jane"


def test_as_text(home, capsys):
    out = told(capsys)
    for words in (
        f"d2o              {__version__}",
        "torch",
        "processor",
        "bf16 ",
        "~/cache, 2.9 KiB",
        "digits",
        "ships with d2o",
        "can run",
        "d2o export --format onnx",
        "devices (--device)\n  ",
    ):
        assert words in out, words
    assert "hf_secret" not in out and "jane" not in out


def test_as_json(home, capsys):
    found = json.loads(told(capsys, "--json"))
    assert (
        found["versions"]["d2o"] == __version__
        and found["caches"]["d2o"]["bytes"] == 3000
        and found["caches"]["d2o"]["writable"]
    )
    assert (
        found["devices"]["cpu"]
        and found["cpu"]["torch threads"] >= 1
        and found["teachers"]["digits"] == "ships with d2o"
    )
    assert (
        found["extras"]["export"]["for"] == "d2o export --format onnx"
        and "onnx" in found["extras"]["export"]["packages"]
    )
    assert found["settings"]["D2O_HOME"] == "~/cache" and "HF_TOKEN" not in found["settings"]


def test_a_package_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda package: None if package == "pyarrow" else "1")
    assert (
        environment.collect()["can run"]["prompts in .parquet files"] == "no: pyarrow missing; pip install 'd2o[pairs]'"
    )


def test_a_torch_that_is_broken_does_not_keep_the_rest_from_being_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    out = told(capsys)
    assert "cannot be told  ModuleNotFoundError" in out or "cannot be told  ImportError" in out
    assert "versions" in out and "caches" in out and "optional packages" in out
