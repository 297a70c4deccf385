"""Stored latents, as EDM2's dataset tool packs them: read, refused where damaged, and trained on."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.data.images import open_images
from d2o.data.stored_latents import LatentSet, open_set
from d2o.errors import UserError
from d2o.methods.sid import SiD
from d2o.methods.spi_gan import SPIGAN
from d2o.recipes.load import load_recipe
from d2o.spaces.load import SPACES
from d2o.teachers.base import Spec, Teacher
from d2o.training import setup as preparation
from tests.latent import tiny_vae
from tests.methods.test_latent import train

READING = {"resolution": None, "channels": None, "on_bad": "refuse", "limit": None}


def npy(values) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def stored(n: int = 6, size: int = 8, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate(
        [rng.normal(0, 4, (n, 4, size, size)), rng.uniform(0, 0.1, (n, 4, size, size))], axis=1
    ).astype(dtype)


def pack(path, values, labels=True):
    """As EDM2's `dataset_tool.py encode` does."""
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"{i // 4:05d}/img-mean-std-{i:08d}.npy" for i in range(len(values))]
        for name, one in zip(names, values, strict=True):
            archive.writestr(name, one if isinstance(one, bytes) else npy(one))
        archive.writestr(
            "dataset.json", json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)] if labels else None})
        )
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_edm2_packs_is_read(dtype, tmp_path):
    values = stored(dtype=dtype)
    found = open_set(pack(tmp_path / "img64-sd.zip", values), **READING | {"resolution": 64})
    assert (
        isinstance(found, LatentSet) and len(found) == 6 and found.shape == (8, 8, 8) and found.name == "img64-sd.zip"
    )
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.classes == 3 and found.bad == []
    assert "6 stored latents" in found.notes[-1]
    got = found.images(torch.tensor([5, 0, 5]))
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.from_numpy(values[[5, 0, 5]].astype(np.float32)))
    few = open_set(tmp_path / "img64-sd.zip", **READING | {"limit": 2})
    assert len(few) == 2 and few.fingerprint != found.fingerprint


def test_a_folder_and_no_labels(tmp_path):
    with zipfile.ZipFile(pack(tmp_path / "a.zip", stored(), labels=False)) as archive:
        archive.extractall(tmp_path / "folder")
    found = open_set(tmp_path / "folder", **READING)
    assert len(found) == 6 and found.labels is None and found.classes == 0


def test_one_of_another_size_is_named_or_left_out(tmp_path):
    values = [*stored(3), stored(1, size=4)[0]]
    path = pack(tmp_path / "a.zip", values)
    with pytest.raises(
        UserError, match=r"1 bad file in a.zip:\n  00000/img-mean-std-00000003.npy: 640 bytes, the others 2176"
    ):
        open_set(path, **READING)
    found = open_set(path, **READING | {"on_bad": "skip"})
    assert len(found) == 3 and [name for name, _ in found.bad] == ["00000/img-mean-std-00000003.npy"]
    assert found.labels.tolist() == [0, 1, 2]


def bad_values(change):
    values = stored(1)[0]
    change(values)
    return values


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (b"\x93NUMPY\x01\x00", "no readable .npy"),
        (npy(stored(1)[0][:7]), r"holds float32 \[7, 8, 8\], not the floats \[2C, h, w\]"),
        (npy(stored(1)[0].astype(np.int32)), "holds int32"),
        (bad_values(lambda v: v.__setitem__((0, 0, 0), np.nan)), "not finite, or negative"),
        (bad_values(lambda v: v.__setitem__((7, 0, 0), -1)), "not finite, or negative"),
    ],
)
def test_damaged_latents_are_refused(one, words, tmp_path):
    path = pack(tmp_path / "a.zip", [one])
    with pytest.raises(UserError, match=words):
        open_set(path, **READING)


def test_a_file_that_differs_inside_is_found_when_it_is_read(tmp_path):
    values = stored(2)
    found = open_set(pack(tmp_path / "a.zip", [values[0], values[1].transpose(1, 0, 2).reshape(4, 16, 8)]), **READING)
    with pytest.raises(
        UserError, match=r"img-mean-std-00000001.npy in a.zip has shape \[4, 16, 8\], the first one \[8, 8, 8\]"
    ):
        found.images([1])


def test_latents_are_no_images_and_images_no_latents(tmp_path):
    path = pack(tmp_path / "a.zip", stored())
    with pytest.raises(UserError, match="a.zip holds stored latents .*, and images are needed here"):
        open_images(path)
    with pytest.raises(UserError, match="latents of images of 64 x 64, and data.resolution is 512"):
        open_set(path, **READING | {"resolution": 512})
    with pytest.raises(UserError, match="holds stored latents, and this method takes images"):
        preparation.open_data(load_recipe("spi_gan_digits", [f"data.path={path}"]).data, SPIGAN)
    with pytest.raises(UserError, match="data.xflip: stored latents are not mirrored"):
        preparation.open_data(load_recipe("sida_digits", [f"data.path={path}", "data.xflip=true"]).data, SiD)
    assert type(open_set("real:digits", **READING)).__name__ == "ImageSet"


@pytest.mark.long
def test_sida_trains_on_stored_latents_without_an_autoencoder(tmp_path, monkeypatch):
    from d2o.networks.edm2_unet import EDM2Precond

    torch.manual_seed(0)
    small = {
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [],
        "channels_per_head": 16,
    }
    network = EDM2Precond(img_resolution=8, img_channels=4, label_dim=3, **small).eval()
    teacher = Teacher(network, Spec("tiny-edm2", (4, 8, 8), "edm2", "label", 3, licence="CC0-1.0"))
    monkeypatch.setattr(preparation, "load_teacher", lambda *args, **kwargs: teacher)
    monkeypatch.setattr(teacher.space, "_load", tiny_vae)  # for the preview; to train none is needed
    values = stored(16)
    path = pack(tmp_path / "img64-sd.zip", values)
    changes = [
        f"data.path={path}",
        "data.resolution=64",
        "data.channels=3",
        "images=24",
        "batch=8",
        "sid.batch_pool=4",
        "sid.start_g_nimg=0",
        "sid.start_adv_nimg=8",
        "eval=null",
        "preview={every: 24, n: 4}",
    ]
    train(load_recipe("sida_digits", changes, mini=True), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "loss_adv" in log[-1] and log[-1]["images"] == 24
    assert Image.open(tmp_path / "run" / "previews" / "000000024.png").mode == "RGB"
    noise = torch.randn(2, 4, 8, 8)
    mean, std = torch.from_numpy(values[:2]).chunk(2, dim=1)
    torch.testing.assert_close(
        teacher.space.encode(torch.from_numpy(values[:2]), noise), SPACES["edm2"].normalise(mean + std * noise)
    )
    with pytest.raises(
        UserError, match="'tiny-edm2' makes 4 x 8 x 8 in space edm2, .* means and standard deviations of 8 x 4 x 4"
    ):
        train(
            load_recipe(
                "sida_digits", [f"data.path={pack(tmp_path / 'b.zip', stored(size=4))}", *changes[3:]], mini=True
            ),
            tmp_path / "other",
        )
