"""`d2o train` on one's own images, in every container, with good and bad files."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import d2o
from d2o.cli.app import main
from tests.helpers import tiny_student

RECIPE = """
name: mine
method: edm
network: {arch: ddpmpp, model_channels: 16, channel_mult: [1], num_blocks: 1, attn_resolutions: [], dropout: 0.0}
data: {path: nowhere, resolution: 8, channels: 1, xflip: true}
optim: {lr: 1.0e-3}
batch: 8
images: 32
log_every: 1
threads: 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


def pictures() -> list[tuple[str, bytes, int]]:
    """Twelve pictures of odd sizes in two classes: (name, PNG, class)."""
    found = []
    for i in range(12):
        buffer = io.BytesIO()
        pixels = np.random.RandomState(i).randint(0, 255, (9 + i, 14, 3)).astype("uint8")
        Image.fromarray(pixels).save(buffer, "PNG")
        found.append((f"{'cat' if i % 2 else 'dog'}/{i:02d}.png", buffer.getvalue(), 0 if i % 2 else 1))
    return found


def folder(at: Path) -> Path:
    for name, data, _ in pictures():
        (at / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (at / "images" / name).write_bytes(data)
    return at / "images"


def edm_zip(at: Path) -> Path:
    with zipfile.ZipFile(at / "x.zip", "w") as file:
        for name, data, _ in pictures():
            file.writestr(name, data)
        file.writestr("dataset.json", json.dumps({"labels": [[name, label] for name, _, label in pictures()]}))
    return at / "x.zip"


def webdataset(at: Path) -> Path:
    with tarfile.open(at / "x.tar", "w") as file:
        for i, (_, data, label) in enumerate(pictures()):
            for name, content in ((f"{i:04d}.png", data), (f"{i:04d}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return at / "x.tar"


def npz(at: Path) -> Path:
    np.savez(at / "x.npz", images=np.zeros((12, 10, 10, 1), "uint8"), labels=np.arange(12) % 2)
    return at / "x.npz"


@pytest.mark.parametrize("container", [folder, edm_zip, webdataset, npz])
def test_a_teacher_of_own_images_is_a_teacher_like_any_other(container, recipe, tmp_path):
    assert run("train", recipe, "--data", container(tmp_path), "--out", tmp_path / "run") == 0
    teacher = d2o.load_teacher(tmp_path / "run")
    assert teacher.spec.shape == (1, 8, 8) and teacher.spec.classes == 2
    resolved = (tmp_path / "run" / "recipe.yaml").read_text()
    assert str(container(tmp_path).name) in resolved and "nowhere" not in resolved


def test_corrupt_images_are_named_and_refused_or_skipped(recipe, tmp_path, capsys):
    images = folder(tmp_path)
    (images / "cat" / "01.png").write_bytes((images / "cat" / "01.png").read_bytes()[:60])
    assert run("train", recipe, "--data", images, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "cat/01.png" in err and "--on-bad skip" in err and not (tmp_path / "run").exists()
    assert run("train", recipe, "--data", images, "--on-bad", "skip", "--out", tmp_path / "run") == 0
    assert "skipped cat/01.png" in capsys.readouterr().err


def test_missing_images_and_options_that_would_be_ignored(recipe, tmp_path, capsys):
    assert run("train", recipe, "--out", tmp_path / "run") == 2 and "nowhere" in capsys.readouterr().err
    assert run("train", recipe, "--data", folder(tmp_path), "--on-bad", "perhaps", "--out", tmp_path / "run") == 2
    assert "on_bad" in capsys.readouterr().err
    assert run("train", "quickstart", "--data", tmp_path / "images", "--out", tmp_path / "run") == 2
    assert "trains on pairs" in capsys.readouterr().err
    tiny_student(tmp_path / "s.safetensors")
    assert (
        run(
            "finetune",
            recipe,
            "--from",
            tmp_path / "s.safetensors",
            "--data",
            tmp_path / "images",
            "--out",
            tmp_path / "run",
        )
        == 2
    )
    assert "cannot start from a student" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_student_of_spi_gan_is_trained_further(tmp_path, capsys):
    small = ["--mini", "--set", "images=64", "--set", "batch=16", "--set", "eval=null", "--set", "preview=null"]
    assert run("train", "spi_gan_digits", *small, "--out", tmp_path / "a") == 0
    assert run("finetune", "spi_gan_digits", *small, "--from", tmp_path / "a", "--out", tmp_path / "b") == 0
    assert run("finetune", "dd_gan_digits", *small, "--from", tmp_path / "a", "--out", tmp_path / "c") == 2
    assert "goes on with students of kind multistep; the one to start from is of kind style" in capsys.readouterr().err
