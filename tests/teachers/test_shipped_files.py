"""What ships with d2o has the digests that are listed beside it, and is refused when it does not."""

import shutil
from importlib import resources
from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.interop import assets
from d2o.interop.assets import asset
from d2o.teachers.registry import BUILTIN

ASSETS = Path(str(resources.files("d2o") / "assets"))


def test_every_shipped_file_is_listed():
    listed = {line.split()[1] for line in (ASSETS / "sha256sums.txt").read_text().splitlines()}
    there = {path.relative_to(ASSETS).as_posix() for path in ASSETS.rglob("*") if path.is_file()}
    assert listed == {name for name in there if not name.endswith((".md", "sha256sums.txt", "words.json"))}


@pytest.mark.parametrize("damaged", ["teacher_digits.safetensors", "tiny-sd/unet/config.json"])
def test_a_changed_file_is_refused(tmp_path, monkeypatch, damaged):
    shutil.copytree(ASSETS, tmp_path / "assets")
    path = tmp_path / "assets" / damaged
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(assets.resources, "files", lambda package: tmp_path)
    asset.cache_clear()
    try:
        name = next(name for name in BUILTIN.values() if damaged.startswith(name))
        with pytest.raises(UserError, match=f"{damaged}.*install d2o again"):
            asset(name)
        monkeypatch.setenv("D2O_TRUST", "1")
        assert asset(name) == tmp_path / "assets" / name
    finally:
        asset.cache_clear()
