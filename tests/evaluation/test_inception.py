"""The Inception extractors against torch-fidelity, pytorch-fid and clean-fid with the same random weights, and the
files that they come in."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from d2o.errors import UserError
from d2o.evaluation import named_extractors
from d2o.evaluation.named_extractors import WAYS, FeatureExtractor, load_extractor
from d2o.features import inception
from d2o.features.inception import read_inception
from d2o.interop.safetensors_io import file_sha256
from d2o.interop.torchvision_compat import ensure
from d2o.networks.inception import Inception, from_tensorflow_names
from tests.evaluation.inception_graph import Graph
from tests.interop.conftest import nvidia_modules  # noqa: F401 (a fixture)
from tests.interop.nvidia_writer import Persistent, dumps

ensure()
import pytorch_fid.inception  # noqa: E402
from cleanfid.resize import build_resizer  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402

ALL = ("features", "spatial", "logits")


def noise(size, count=1):
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(size), dtype=torch.uint8
    )


@pytest.fixture(scope="module")
def tensors():
    """Random weights as NVIDIA's files name them."""
    graph = Graph(seed=1)
    graph(torch.zeros(1, 3, 299, 299))
    return graph.tensors


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    """The same as pytorch-fid's file holds them."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    network = Inception()
    network.load_state_dict(from_tensorflow_names(tensors), strict=False)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(file):
    return load_extractor("inception", weights=file)


def way(name, extractor):
    """The same network, fed as another tool does."""
    return FeatureExtractor(name, extractor.network, prepare=WAYS[name].prepare, resize=WAYS[name].resize)


@pytest.fixture(scope="module")
def fidelity(file):
    return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file))


@pytest.mark.long
@pytest.mark.parametrize("size", [32, 64, 256, 299, 512])
def test_inception_equals_torch_fidelity(extractor, fidelity, size):
    images = noise(size)
    found = extractor.outputs(images, ("features", "logits"))
    with torch.inference_mode():
        features, logits = fidelity(images)
    assert features.mean() > 0.1
    assert (found["features"] - features).abs().max() <= 3e-5 and (found["logits"] - logits).abs().max() <= 3e-5


@pytest.mark.long
def test_legacy_pytorch_equals_pytorch_fid(extractor, file, monkeypatch):
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: torch.load(file))
    theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    ours = way("inception-legacy_pytorch", extractor)
    for size in (32, 299, 512):
        images = noise(size)
        with torch.inference_mode():
            expected = theirs(images / 255)[0].flatten(1)
        assert (ours.features(images) - expected).abs().max() <= 3e-5, size


def test_clean_equals_clean_fid(extractor, fidelity):
    """clean-fid resizes outside, then feeds TensorFlow's network with (x - 128) / 128; its own TorchScript file is not
    to be had offline."""
    ours = way("inception-clean", extractor)
    fast = way("inception-clean_torch", extractor)
    resize = build_resizer("clean")
    for size in (32, 512):
        images = noise(size)
        x = torch.from_numpy(resize(images[0].permute(1, 2, 0).numpy())).permute(2, 0, 1)[None]
        assert torch.equal(ours.prepare(images), (x - 128) / 128)
        assert (fast.prepare(images) - ours.prepare(images)).abs().max() < 1e-4
    tensorflow, clean, near = (e.features(noise(32)) for e in (extractor, ours, fast))
    assert (clean - near).abs().max() < 0.01 < 0.05 < (clean - tensorflow).abs().max()


@pytest.mark.long
def test_what_an_extractor_says(extractor, file, monkeypatch):
    assert (extractor.name, extractor.dim, extractor.classes, extractor.shape, extractor.has) == (
        "inception",
        2048,
        1008,
        None,
        ALL,
    )
    assert extractor.sha256 == file_sha256(file)
    monkeypatch.setattr(inception, "read_inception", lambda path: Inception())
    made = {name: load_extractor(name, weights=file) for name in WAYS if name.startswith("inception")}
    assert {name: (found.name, found.resize) for name, found in made.items()} == {
        "inception": ("inception", "tf_bilinear299"),
        "inception-tf": ("inception", "tf_bilinear299"),
        "inception-clean": ("inception-clean", "clean_pil299"),
        "inception-clean_torch": ("inception-clean_torch", "clean_torch299"),
        "inception-legacy_pytorch": ("inception-legacy_pytorch", "torch_bilinear299"),
    }


def test_batches_and_grey_images(extractor, monkeypatch):
    monkeypatch.setattr(named_extractors, "at_once", lambda device: 2)
    images = noise(32, 3)[:, :1]
    together = extractor.outputs(images, ALL)
    assert {name: tuple(value.shape) for name, value in together.items()} == {
        "features": (3, 2048),
        "spatial": (3, 2023),
        "logits": (3, 1008),
    }
    alone = extractor.outputs(images[2:].repeat(1, 3, 1, 1), ALL)
    for name in ALL:
        torch.testing.assert_close(together[name][2:], alone[name], rtol=1e-5, atol=1e-5)
        assert together[name].dtype == torch.float32 and (together[name][0] - together[name][1]).abs().max() > 0.01


def nest(tensors):
    """A module that holds these tensors under these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def persistent(module):
    children = {name: persistent(child) for name, child in module._modules.items()}
    state = {**module.__dict__, "_modules": children, "_init_args": (), "_init_kwargs": {}}
    return Persistent("InceptionV3" if "output" in children else "Conv2dLayer", state)


def pickled(tensors, path):
    path.write_bytes(dumps(persistent(nest(tensors))))


def scripted(tensors, path):
    torch.jit.script(nest(tensors)).save(str(path))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("nvidia_modules")
@pytest.mark.parametrize("write", [pickled, scripted, torch.save, save_file])
def test_every_packaging_gives_the_same_network(tensors, file, tmp_path, write):
    """NVIDIA's .pkl and .pt, OpenAI's state dict; pytorch-fid's is the fixture's."""
    write(tensors, tmp_path / "inception")
    expected = read_inception(file).state_dict()
    found = read_inception(tmp_path / "inception").state_dict()
    (tmp_path / "inception").unlink()
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_networks_are_refused_in_words(tensors, tmp_path):
    state = from_tensorflow_names(tensors)
    path = tmp_path / "x.safetensors"
    shape = {"Mixed_5b.branch1x1.conv.weight": torch.zeros(1, 192, 1, 1)}
    for other, message in [
        (
            {**state, "fc.weight": torch.zeros(1000, 2048)},
            "torchvision's inception_v3, trained on ImageNet with 1000 classes",
        ),
        ({**state, "AuxLogits.fc.weight": torch.zeros(1)}, "torchvision's inception_v3"),
        ({"conv1.weight": torch.zeros(3)}, r"no 'Conv2d_1a_3x3.conv.weight' \(472 of 566 tensors missing\)"),
        ({**state, **shape}, r"'Mixed_5b.branch1x1.conv.weight' has the shape \(1, 192, 1, 1\), not \(64, 192, 1, 1\)"),
    ]:
        save_file(copy.copy(other), path)
        with pytest.raises(UserError, match=message) as caught:
            load_extractor("inception", weights=path)
        assert str(path) in caught.value.message
    with pytest.raises(UserError, match="unknown extractor 'inception-cleaner'"):
        load_extractor("inception-cleaner", weights=path)
