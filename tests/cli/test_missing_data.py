"""A recipe whose images are not there says how to get them; with them it trains."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from d2o.data.known import GET
from d2o.interop.safetensors_io import read_meta
from d2o.recipes.load import load_recipe
from tests.cli.test_train import RECIPE, run

OWN = RECIPE.replace("path: nowhere", "path: nowhere, get: ask the museum of Ghent")


@pytest.mark.parametrize("name", ["spi_gan_cifar10", "spi_gan_256:celeba", "spi_gan_256:church"])
def test_one_screen_says_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    data = load_recipe(name).data
    for _ in range(2):  # the first leaves nothing behind that stops the second
        assert run("train", name) == 2
        said = capsys.readouterr().err
        assert f"no such file or folder: {data.path}" in said and "accepted: a folder of images" in said
        assert all(line in said for line in GET[data.get].splitlines())
        assert f"d2o train {name} --data PATH" in said and f"d2o train {name} --mini" in said
        assert sum(-(-len(line) // 100) for line in said.splitlines()) <= 24
    assert not list(tmp_path.iterdir())
    assert run("train", name, "--data", "typo", "--set", "batch=32") == 2
    assert "no such file or folder: typo" in (said := capsys.readouterr().err) and "--mini" in said
    assert "the licence of these images is not stated; --set data.licence=" in said


def test_own_recipes_say_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(OWN)
    assert run("train", "mine.yaml") == 2
    said = capsys.readouterr().err
    assert "ask the museum of Ghent" in said and "--mini" not in said  # it has none
    assert run("train", "mine.yaml", "--plan") == 1
    said = capsys.readouterr().out
    assert (
        "missing: no such file or folder: nowhere; training says how to get them" in said and "trained weights" in said
    )
    assert run("train", "mine.yaml", "--set", "data.get=celebahq") == 2
    assert "expected a text, or one of cifar10, celeba_hq, lsun_church" in capsys.readouterr().err


@pytest.mark.long
def test_a_folder_of_256_px_trains(tmp_path):
    (tmp_path / "faces").mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(
            tmp_path / "faces" / f"{i}.jpg"
        )
    small = [
        "network={h_dim: 8, mapping: {r_layers: 2}, synthesis: {base: 1024, max_channels: 8}}",
        "spi_gan.critic={blocks: resnet, base: 1024, max_channels: 8, mbstd_group: 2, time_dim: 8}",
        "batch=4",
        "micro_batch=2",
        "images=8",
        "data.limit=4",
        "eval=null",
        "preview=null",
        "log_every=1",
        "threads=1",
    ]
    out = tmp_path / "run"
    assert (
        run(
            "train",
            "spi_gan_256:celeba",
            "--data",
            tmp_path / "faces",
            "--out",
            out,
            *(part for text in small for part in ("--set", text)),
        )
        == 0
    )
    meta = read_meta(out / "checkpoints" / "last.safetensors")
    assert (
        meta["kind"] == "student" and meta["spec"]["shape"] == [3, 256, 256] and meta["spec"]["licence"] == "not stated"
    )
