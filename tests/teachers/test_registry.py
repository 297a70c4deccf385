"""Teachers by name: found where they were put, with licence, usual solver and a clear word where they are absent."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2o.data.pair_settings import PairSettings
from d2o.errors import UserError
from d2o.interop import catalogue
from d2o.interop.nvidia_pickle import NvidiaNetwork
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.teachers.registry import load_teacher, stated_licence, teacher_names

GOLDEN = Path(__file__).parents[1] / "golden" / "edm"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    (tmp_path / "home" / "teachers").mkdir(parents=True)
    return tmp_path / "home"


def test_a_named_teacher_is_used_where_it_was_put(home, tmp_path):
    shutil.copy(GOLDEN / "edm-ddpmpp.pkl", home / "teachers" / "edm-ffhq-64x64-uncond-vp.pkl")
    said = []
    teacher = load_teacher("edm-ffhq-vp", say=said.append)
    assert teacher.spec.name == "edm-ffhq-vp" and (teacher.spec.solver, teacher.spec.steps) == ("heun", 40)
    assert len(said) == 1 and "CC BY-NC-SA 4.0" in said[0] and "non-commercial" in said[0]
    load_teacher("edm-ffhq-vp", say=said.append)
    assert len(said) == 1  # once per machine
    store = make_pairs(
        PairSettings("edm-ffhq-vp", 2, steps=1), tmp_path / "pairs", compute=Compute(2, 1), teacher=teacher
    )
    assert (
        store is not None and store.manifest["teacher"]["licence"] == teacher.spec.licence == "CC BY-NC-SA 4.0 (NVIDIA)"
    )


def test_an_absent_teacher_says_what_to_put_where(home):
    with pytest.raises(UserError) as error:
        load_teacher("edm2-img512-s")
    assert (
        "D2O_OFFLINE" in error.value.message
        and str(home / "teachers" / "edm2-img512-s-2147483-0.130.pkl") in error.value.hint
    )
    for name in ("sdxl", "someone/something"):
        with pytest.raises(UserError) as error:
            load_teacher(name)
        assert "network is switched off" in error.value.message and "hf download" in error.value.hint
    for name in ("sd1.5", "edm-cifar10", "a/b/c"):
        with pytest.raises(UserError, match="unknown teacher"):
            load_teacher(name)
    assert {"digits", "tiny-sd", "sd15", "sdxl", "edm-imagenet64-adm", "edm2-img512-xxl"} <= set(teacher_names())


def test_a_damaged_download_is_not_loaded(home):
    whole = (GOLDEN / "edm-ddpmpp.pkl").read_bytes()
    (home / "teachers" / "edm-cifar10-32x32-cond-vp.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="edm-cifar10-32x32-cond-vp.pkl"):
        load_teacher("edm-cifar10-cond-vp")


def test_edm2_decodes_by_the_autoencoder_of_its_latents(home, monkeypatch):
    from d2o.interop import torchvision_compat

    torchvision_compat.ensure()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
    }
    vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, layers_per_block=1, **blocks)
    vae.save_pretrained(home / "teachers" / "sd-vae-ft-mse")
    entry = replace(catalogue.AUTOENCODERS["sd-vae-ft-mse"], sha256=None, bytes=None)
    monkeypatch.setitem(catalogue.AUTOENCODERS, "sd-vae-ft-mse", entry)
    monkeypatch.setattr(NvidiaNetwork, "space", "latent")  # the golden file is of a network of pixels
    teacher = load_teacher(GOLDEN / "edm2-tiny.pkl")
    assert (teacher.spec.space, teacher.spec.steps, teacher.spec.classes) == ("edm2", 32, 10)
    x = teacher.sample(torch.randn(2, *teacher.spec.shape), torch.tensor([1, 2]), steps=2)
    images = teacher.decode(x)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1 and images.std() > 0


def test_a_repositorys_licence_is_read_from_its_card(tmp_path):
    assert stated_licence(tmp_path) == "not stated"
    for text, licence in (
        ("---\nlicense: creativeml-openrail-m\ntags:\n- x\n---\n# Model", "creativeml-openrail-m"),
        ("---\nlicense: other\nlicense_name: 'my-licence'\n---\n", "my-licence"),
        ("# No head\nlicense: mit\n", "not stated"),
        ("", "not stated"),
    ):
        (tmp_path / "README.md").write_text(text)
        assert stated_licence(tmp_path) == licence


def test_networks_that_dropped_no_class_cannot_be_guided(tmp_path):
    with pytest.raises(UserError, match="trained with a class for every image; it cannot be guided"):
        make_pairs(PairSettings(str(GOLDEN / "edm-ddpmpp.pkl"), 2, steps=1, cfg=2.0), tmp_path / "p")
    assert not (tmp_path / "p").exists()
