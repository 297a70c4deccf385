import itertools
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.errors import UserError
from d2o.evaluation.named_extractors import load_extractor
from d2o.evaluation.resizing import rounded_bicubic
from d2o.features.dreamsim import DINO
from d2o.interop import torchvision_compat
from d2o.metrics.diversity import dream_diversity, dreamsim_distance

torchvision_compat.ensure()

import peft  # noqa: E402 (these import torchvision)
from dreamsim.feature_extraction.extractor import ViTExtractor  # noqa: E402
from dreamsim.feature_extraction.load_clip_as_dino import QuickGELU  # noqa: E402
from dreamsim.feature_extraction.vision_transformer import VisionTransformer  # noqa: E402
from dreamsim.model import PerceptualModel  # noqa: E402

KINDS = ("dino_vitb16", "clip_vitb16", "open_clip_vitb16")


def small_transformer(kind):
    """The package's network for `kind`, 12 blocks of width 64 instead of 768, with random weights; and its
    projection."""
    network = VisionTransformer(embed_dim=64, depth=12, num_heads=1, qkv_bias=True, norm_layer=torch.nn.LayerNorm)
    if kind != "dino_vitb16":
        network.pos_drop = torch.nn.LayerNorm(64)
    if kind == "clip_vitb16":
        for block in network.blocks:
            block.mlp.act = QuickGELU()
    for module in network.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6 if kind == "dino_vitb16" else 1e-5
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return network, (torch.nn.Identity() if kind == "dino_vitb16" else torch.randn(64, 32))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package's own model of three small transformers with adapters, and a folder with its weights as they are
    released."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("release")
    with pytest.MonkeyPatch.context() as patch:
        made = {kind: small_transformer(kind) for kind in KINDS}
        torch.save(made["dino_vitb16"][0].state_dict(), folder / DINO)
        for kind in KINDS[1:]:
            network, projection = made[kind]
            torch.save(
                {"state_dict": {**network.state_dict(), "proj": projection}}, folder / f"{kind}_pretrain.pth.tar"
            )
        patch.setattr(ViTExtractor, "create_model", staticmethod(lambda kind, _: made[kind]))
        model = PerceptualModel(
            ",".join(KINDS), "cls,embedding,embedding", "16,16,16", lora=True, normalize_embeds=True, device="cpu"
        )
    config = peft.LoraConfig(r=4, lora_alpha=0.5, lora_dropout=0.3, bias="none", target_modules=["qkv"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.normal_()
    adapted.save_pretrained(folder / "ensemble_lora")
    return adapted.eval().requires_grad_(False), folder


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_embedding_and_distance_are_the_packages(package, images):
    model, folder = package
    extractor = load_extractor("dreamsim", weights=folder)
    found = extractor.features(images)
    with torch.no_grad():
        expected = model.embed(rounded_bicubic(images, 224) / 255)
        distance = model(rounded_bicubic(images[:1], 224) / 255, rounded_bicubic(images[1:2], 224) / 255)
    assert found.shape == (3, extractor.dim) == (3, 64 + 32 + 32)
    assert (expected[0] - expected[1]).abs().max() > 0.01
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(dreamsim_distance(found[:1], found[1:2]), distance, atol=1e-5)
    assert extractor.resize == "bicubic224" and len(extractor.sha256) == 64


def test_adapters_count(package, images, tmp_path):
    shutil.copytree(package[1], tmp_path / "release")
    file = tmp_path / "release" / "ensemble_lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 0.0}))
    without, adapted = (load_extractor("dreamsim", weights=at) for at in (tmp_path / "release", package[1]))
    assert (without.features(images) - adapted.features(images)).abs().max() > 1e-3
    assert without.sha256 != adapted.sha256


def test_the_archive_is_the_folder(package, images, tmp_path):
    archive = tmp_path / "dreamsim_ensemble_checkpoint.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in package[1].rglob("*"):
            if path.is_file() and path.name != DINO:
                file.write(path, path.relative_to(package[1]))
    (tmp_path / "checkpoints").mkdir()  # where torch.hub puts it for the package
    shutil.copy(package[1] / DINO, tmp_path / "checkpoints")
    packed, unpacked = load_extractor("dreamsim", weights=archive), load_extractor("dreamsim", weights=package[1])
    assert packed.sha256 == unpacked.sha256
    assert torch.equal(packed.features(images), unpacked.features(images))


def test_what_is_missing_or_foreign_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    with pytest.raises(UserError, match="dreamsim_ensemble_checkpoint.zip"):
        load_extractor("dreamsim")
    folder = tmp_path / "release"
    shutil.copytree(package[1], folder)

    def refused(words):
        with pytest.raises(UserError, match=words):
            load_extractor("dreamsim", weights=folder)

    (folder / DINO).rename(folder / "elsewhere")
    refused(f"needs the weights of DINO(.|\n)*put it at {folder / DINO}")
    (folder / "elsewhere").rename(folder / DINO)
    adapter = folder / "ensemble_lora" / "adapter_config.json"
    good = adapter.read_text()
    adapter.write_text(json.dumps(json.loads(good) | {"use_dora": True}))
    refused("use_dora")
    adapter.write_text("{}")
    refused("no configuration of a LoRA")
    adapter.write_text(good)
    (folder / "clip_vitb16_pretrain.pth.tar").write_bytes((folder / DINO).read_bytes())
    refused("no image encoder with a projection")
    (folder / "clip_vitb16_pretrain.pth.tar").unlink()
    refused("lack clip_vitb16_pretrain.pth.tar")
    (tmp_path / DINO).write_bytes(b"")
    (tmp_path / "no.zip").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="no zip archive"):
        load_extractor("dreamsim", weights=tmp_path / "no.zip")


@pytest.mark.parametrize("size", [(32, 32), (211, 300), (224, 224), (512, 512)])
def test_resize_is_pillows(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float32)
    found = rounded_bicubic(torch.from_numpy(image).permute(2, 0, 1)[None], 224)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.01


def test_diversity_is_the_mean_over_unordered_pairs_then_over_prompts():
    torch.manual_seed(0)
    e = torch.randn(6, 5)
    values = [
        np.mean(
            [
                dreamsim_distance(e[i : i + 1].double(), e[j : j + 1].double()).item()
                for i, j in itertools.combinations(range(k, k + 3), 2)
            ]
        )
        for k in (0, 3)
    ]
    mean, std = dream_diversity(e, 3)
    assert mean == pytest.approx(np.mean(values), rel=1e-12)
    assert std == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert dream_diversity(e[:1].repeat(8, 1), 8)[0] == pytest.approx(0, abs=1e-12)
    assert dream_diversity(torch.eye(4), 4) == (1.0, 0.0)


def test_diversity_of_what_has_no_pairs():
    with pytest.raises(UserError, match="7 images are no whole number of prompts"):
        dream_diversity(torch.randn(7, 4), 2)
    with pytest.raises(UserError, match="per prompt make none"):
        dream_diversity(torch.randn(4, 4), 1)
    with pytest.raises(UserError, match="pairs of embeddings"):
        dreamsim_distance(torch.randn(2, 4), torch.randn(3, 4))
