"""Backbones of projected critics against the maps that the official critic's heads got: the taps, the normalisation and
the resize, under random projections written here from the description of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from d2o.errors import UserError
from d2o.features import Backbone, deit, lite0, load_backbone, load_features, vgg16
from d2o.features.backbone import probe
from d2o.features.common import IMAGENET_MEAN, IMAGENET_STD

FOLDER = Path(__file__).parents[1] / "golden" / "gdd"


def drawn(shapes, first, head=""):
    """Weights by the rule of tests/golden/README.md; `head` is what the names are sorted with in front."""
    state = {}
    for i, name in enumerate(sorted(shapes, key=lambda name: head + name)):
        shape = shapes[name]
        r = torch.randn(shape, generator=torch.Generator().manual_seed(first + i))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("running_var"):
            state[name] = 1 + 0.1 * r.abs()
        elif name.endswith(("running_mean", "bias")):
            state[name] = 0.05 * r
        elif r.ndim == 4:
            state[name] = r * (2 / r[0].numel()) ** 0.5
        elif r.ndim == 3:
            state[name] = 0.2 * r
        elif r.ndim == 2:
            state[name] = r / r.shape[1] ** 0.5
        else:
            state[name] = 1 + 0.05 * r
    return state


def projections(name, first):
    """The official critic's random layers [weights by name], and its numbers."""
    keys = json.loads((FOLDER / f"{name}_keys.json").read_text())
    state = {}
    for i, key in enumerate(sorted(keys)):
        if not key.startswith("feature_networks."):
            continue
        r = torch.randn(keys[key], generator=torch.Generator().manual_seed(first + i))
        transposed = "pretrained" in key and key.endswith(("layer1.4.weight", "layer2.4.weight"))
        fan = r.shape[0] if transposed else r[0].numel()
        state[key.removeprefix("feature_networks.")] = r / fan**0.5 if r.ndim == 4 else 0.1 * r
    return state, load_file(FOLDER / f"{name}.safetensors")


def mixed(maps, state, name):
    """Cross-channel mixing of four maps, then cross-scale mixing from the deepest on (Projected GAN, section 3.2)."""

    def conv(x, layer):
        return F.conv2d(x, state[f"{name}.scratch.{layer}.weight"], state[f"{name}.scratch.{layer}.bias"])

    out, below = [], None
    for level in (3, 2, 1, 0):
        x = conv(maps[level], f"layer{level}_ccm")
        x = x if below is None else x + below
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        below = conv(x, f"layer{level}_csm.out_conv")
        out.insert(0, below)
    return out


def check(backbone, index, name, state, golden, widen=lambda maps: maps):
    with torch.no_grad():
        found = mixed(widen(backbone.maps(golden["x"])), state, name)
    for level, x in enumerate(found):
        for key, value in (
            (f"features_{index}_{level}", x[:, ::4, ::8, ::8]),
            (f"means_{index}_{level}", x.mean((2, 3))),
        ):
            assert (value - golden[key]).abs().max() < 1e-4 * golden[key].abs().max(), key


def stand_in():
    kernels, channels, stages = (4, 2, 2, 2), (12, 16, 24, 32), nn.ModuleDict()
    for i, (kernel, before, width) in enumerate(zip(kernels, (3, *channels), channels)):
        stages[f"layer{i}"] = nn.Conv2d(before, width, kernel, stride=kernel)
    stages.load_state_dict(drawn({k: v.shape for k, v in stages.state_dict().items()}, 3000))
    return [nn.Sequential(stage, nn.ReLU()) for stage in stages.values()], channels


def test_four_modules_after_another():
    stages, channels = stand_in()
    backbone = Backbone(stages, channels, IMAGENET_MEAN, IMAGENET_STD)
    state, golden = projections("standin", 4000)
    check(backbone, 0, "resnet18", state, golden)
    assert backbone.channels == channels and backbone.dim == 32
    last = backbone.maps(golden["x"])[-1]
    assert torch.allclose(backbone.vector(golden["x"]), last.mean((2, 3)))
    with pytest.raises(ValueError, match="4 stages, not 3"):
        Backbone(stages[:3], channels[:3], IMAGENET_MEAN, IMAGENET_STD)


def test_a_backbone_is_no_ones_weights():
    """A critic that has it neither trains nor saves it, and cannot wake its dropout or batch norms."""
    stages = [nn.Sequential(nn.Conv2d(c, 4, 3, 2), nn.BatchNorm2d(4), nn.Dropout()) for c in (3, 4, 4, 4)]
    critic = nn.ModuleDict({"backbone": Backbone(stages, [4] * 4, (0.5,) * 3, (0.5,) * 3), "head": nn.Linear(4, 1)})
    critic.requires_grad_(True).train()
    assert [name for name, _ in critic.named_parameters()] == ["head.weight", "head.bias"] == list(critic.state_dict())
    assert critic.training and not any(module.training for module in critic["backbone"].modules())
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    assert torch.equal(critic["backbone"].vector(x), critic["backbone"].vector(x))
    critic["head"](critic["backbone"].vector(x)).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    critic.double()
    assert critic["backbone"].vector(x.double()).dtype == torch.float64  # it goes where the critic goes


@pytest.mark.long
def test_vgg16_bn_has_the_official_taps():
    network = vgg16.batch_normed()
    network.load_state_dict(drawn({k: v.shape for k, v in network.state_dict().items()}, 6000, "features."))
    backbone = vgg16.vgg16_backbone(network)
    probe(backbone)
    state, golden = projections("vgg_lite0_cond", 7000)
    check(backbone, 0, "vgg16_bn", state, golden)
    assert not any(module.training for module in backbone.modules())


def test_lite0_has_the_official_taps():
    state, golden = projections("vgg_lite0_cond", 7000)
    backbone = load_backbone("lite0")
    plain = backbone.maps(golden["x"])
    assert tuple(x.shape[1] for x in plain) == backbone.channels == lite0.CHANNELS
    probe(backbone)
    check(backbone, 1, "tf_efficientnet_lite0", state, golden)
    assert not torch.allclose(backbone.maps(golden["x"])[3], plain[3], rtol=0.1)  # what the probe does is not little


def test_deit_has_the_official_taps():
    network = deit.untrained_deit("deit_tiny_distilled_patch16_224")
    shapes = {k: v.shape for k, v in network.state_dict().items() if not k.startswith("head")}
    network.load_state_dict(drawn(shapes, 8000), strict=False)
    name = "deit_tiny_distilled_patch16_224"
    state, golden = projections("deit_tiny", 9000)

    def widen(maps):
        """The critic's random layers from one grid of tokens each to four sizes."""

        def layer(x, which, function, **options):
            weight, bias = (state[f"{name}.pretrained.{which}.{leaf}"] for leaf in ("weight", "bias"))
            return function(x, weight, bias, **options)

        maps = [layer(x, f"layer{i}.3", F.conv2d) for i, x in enumerate(maps, 1)]
        maps[0] = layer(maps[0], "layer1.4", F.conv_transpose2d, stride=4)
        maps[1] = layer(maps[1], "layer2.4", F.conv_transpose2d, stride=2)
        maps[3] = layer(maps[3], "layer4.4", F.conv2d, stride=2, padding=1)
        return maps

    check(deit.deit_backbone(network), 0, name, state, golden, widen)


@pytest.mark.long
@pytest.mark.parametrize("name", ["vgg16_bn", "deit"])
def test_absent_and_foreign_weights_are_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("D2O_HOME", str(tmp_path))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    with pytest.raises(UserError, match="are not on this machine") as error:
        load_backbone(name)
    assert str(tmp_path / "weights") in error.value.hint and "https://" in error.value.hint
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth is not .*: it has no "):
        load_backbone(name, weights=tmp_path / "other.pth")
    with pytest.raises(UserError, match="unknown backbone 'resnet'"):
        load_backbone("resnet")


@pytest.mark.long
def test_published_files_are_read(tmp_path, monkeypatch):
    """torchvision's with a classifier beside, Meta's inside a dictionary."""
    network = vgg16.batch_normed()
    state = {f"features.{name}": value for name, value in network.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(3)}, tmp_path / "vgg16_bn.pth")
    found = load_backbone("vgg16_bn", weights=tmp_path / "vgg16_bn.pth")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(found.maps(x)[3], vgg16.vgg16_backbone(network.eval()).maps(x)[3], atol=1e-5)
    assert len(found.sha256) == 64
    make = deit.untrained_deit
    monkeypatch.setattr(deit, "untrained_deit", lambda *_: make("deit_tiny_distilled_patch16_224"))
    tiny = deit.untrained_deit()
    torch.save({"model": tiny.state_dict()}, tmp_path / "deit.pth")
    with torch.no_grad():
        ours = load_backbone("deit", weights=tmp_path / "deit.pth").maps(x)[3]
        theirs = tiny.eval().get_intermediate_layers(deit_input(x), n=1, reshape=True)[0]  # timm's own way to the grid
    assert torch.allclose(ours, theirs, atol=1e-5)


def deit_input(x):
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return F.interpolate(((x + 1) / 2 - mean) / std, (224, 224), mode="bilinear")


def test_timm_s_own_files_are_read(tmp_path):
    """EfficientNets under timm's names, as it keeps them in its cache; at another size than 224."""
    for name, make in (("tf_efficientnet_lite0", lite0.untrained_lite0), ("tf_efficientnet_b0", lite0.untrained_b0)):
        network = make().eval()
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
        backbone = load_backbone(name, weights=tmp_path / f"{name}.safetensors", size=64)
        x = torch.rand(1, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            maps, theirs = backbone.maps(x), network.forward_intermediates(backbone.prepare(x), intermediates_only=True)
        assert [tuple(y.shape[1:]) for y in maps] == [(c, s, s) for c, s in zip(lite0.CHANNELS, (16, 8, 4, 2))]
        torch.testing.assert_close(maps, theirs[1:], rtol=1e-4, atol=1e-4)


def test_the_classifier_that_ships_is_a_backbone():
    """Four stages, at any size."""
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(load_backbone("digits", size=8).maps(x), load_features("digits").maps(x))
    maps = load_backbone("digits", size=32).maps(x)
    assert [tuple(y.shape[1:]) for y in maps] == [(32, 32, 32), (32, 32, 32), (64, 16, 16), (64, 16, 16)]
    with pytest.raises(UserError, match="takes 1 channels"):
        load_backbone("digits", size=32).maps(torch.zeros(1, 3, 32, 32))
