"""Perceptual distances: over any maps, and LPIPS over its three trunks."""

import pytest
import torch
from torch import nn

from d2o.features import load_features
from d2o.features.lpips import untrained_lpips
from d2o.losses.perceptual import (
    LPIPS,
    TINY,
    Perceptual,
    Target,
    enlarged,
    load_lpips,
    load_perceptual,
    perceptual,
    resized,
    unit,
)
from d2o.spaces.base import LatentSpace
from d2o.spaces.load import SPACES
from tests.latent import tiny_vae


def maps(x):
    return [x, 3 * x[:, :, ::2, ::2]]


def test_by_hand():
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 3, 6, 6)
    expected = torch.zeros(4)
    weighted = torch.zeros(4)
    weights = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 0.5, 0.0])]
    for f, g, w in zip(maps(x), maps(y), weights):
        square = (f / f.norm(dim=1, keepdim=True) - g / g.norm(dim=1, keepdim=True)).square()
        expected += square.sum(1).mean((1, 2))
        weighted += (w[:, None, None] * square).sum(1).mean((1, 2))
    assert torch.allclose(perceptual(x, y, maps), expected, rtol=1e-5)
    assert torch.allclose(perceptual(x, y, maps, weights), weighted, rtol=1e-5)
    assert torch.equal(perceptual(x, x, maps), torch.zeros(4))


def test_where_nothing_is_seen_there_is_a_gradient():
    """The package's division by |f| + 1e-10 has none at f = 0."""
    f = torch.zeros(1, 3, 2, 2, requires_grad=True)
    unit(f, TINY).sum().backward()
    assert f.grad.isfinite().all()
    g = torch.randn(1, 3, 2, 2) * 1e-3
    assert torch.allclose(unit(g, TINY), g / (g.norm(dim=1, keepdim=True) + 1e-10), rtol=1e-6)


def test_half_precision_maps_are_compared_in_single():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 3, 6, 6)
    found = perceptual(x, y, lambda x: [x.to(torch.bfloat16)])
    assert found.dtype == torch.float32
    assert torch.allclose(found, perceptual(x, y, lambda x: [x.to(torch.bfloat16).float()]))


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory):
    """The package's LPIPS with a random SqueezeNet, and torchvision's file of it. The other two trunks are compared
    where the evaluation has them."""
    torch.manual_seed(0)
    theirs = untrained_lpips("squeeze").eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("weights") / "squeeze.pth"
    names = theirs.net.state_dict()
    torch.save({f"features.{name.partition('.')[2]}": value for name, value in names.items()}, path)
    return theirs, path


def pair(*shape):
    torch.manual_seed(1)
    return (torch.rand(2, *shape) * 2 - 1).unbind(0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, of what lpips gives it
def test_squeezenet_is_the_package_s(squeeze):
    theirs, path = squeeze
    ours = load_lpips(trunk="squeeze", weights=path)
    a, b = pair(2, 3, 40, 40)
    with torch.no_grad():
        expected = theirs(a, b).flatten()
        assert expected.min() > 1e-3 and torch.allclose(ours(a, b), expected, rtol=1e-5)
        grey = ours(a[:, :1], b[:, :1])
        assert torch.allclose(grey, ours(a[:, :1].expand(-1, 3, -1, -1), b[:, :1].expand(-1, 3, -1, -1)))
    assert not list(ours.parameters()) and not ours.state_dict()
    a.requires_grad_()
    ours(a, b).sum().backward()
    assert float(a.grad.abs().sum()) > 0
    pooled = load_lpips(trunk="squeeze", pooling="avg", weights=path)
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in pooled.modules())
    kept = [(layer.kernel_size, layer.stride) for layer in pooled.modules() if isinstance(layer, nn.AvgPool2d)]
    assert kept == [(3, 2)] * 3 and [f.shape for f in pooled.maps(b)] == [f.shape for f in ours.maps(b)]
    assert (pooled(a, b) - expected).abs().min() > 1e-4


def test_resized_and_its_gradient_are_the_package_s(squeeze):
    theirs, path = squeeze
    ours = load_lpips(trunk="squeeze", weights=path, size=48)
    a, b = pair(2, 3, 24, 20)
    gradients = []
    for distance in (ours, lambda a, b: theirs(resized(a, 48), resized(b, 48)).flatten()):
        x = a.clone().requires_grad_()
        found = distance(x, b)
        found.sum().backward()
        gradients.append(x.grad)
    with torch.no_grad():
        assert torch.allclose(ours(a, b), theirs(resized(a, 48), resized(b, 48)).flatten(), rtol=1e-5)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("batch", [1, 2])
def test_through_the_decoder(squeeze, batch):
    _, path = squeeze
    space = LatentSpace("sd15", SPACES["sd15"], tiny_vae)
    distance = load_lpips(trunk="squeeze", weights=path, size=40, space=space)
    a, b = pair(batch, 4, 8, 8)
    images = load_lpips(trunk="squeeze", weights=path)
    expected = images(resized(space.pixels(a), 40), resized(space.pixels(b), 40))
    assert torch.allclose(distance(a, b), expected, rtol=1e-5) and distance(a, a).abs().max() == 0
    a.requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad.flatten(1).abs().sum(1).min() > 0 and not list(distance.parameters())


def test_a_target_is_decoded_and_looked_at_once(squeeze):
    _, path = squeeze
    space, decoded = LatentSpace("sd15", SPACES["sd15"], tiny_vae), []
    space.autoencoder.decoder.register_forward_hook(lambda *_: decoded.append(1))
    distance = load_lpips(trunk="squeeze", weights=path, size=40, space=space)
    a, b = pair(1, 4, 8, 8)
    expected = distance(a, b)
    decoded.clear()
    target = distance.target(b.requires_grad_())
    assert isinstance(target, Target) and not decoded
    a.requires_grad_()
    for _ in range(3):
        assert torch.allclose(distance(a, target), expected)
    distance(a, target).sum().backward()
    assert len(decoded) == 1 + 4 and b.grad is None and float(a.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["digits", "lite0"])
def test_over_any_features_by_name(name):
    distance = load_perceptual(name)
    a, b = pair(2, 1, 8, 8)
    assert isinstance(distance, Perceptual) and not isinstance(distance, LPIPS) and distance.weights is None
    assert torch.equal(distance(a, b), perceptual(a, b, load_features(name).maps))
    assert torch.allclose(distance(a, distance.target(b)), distance(a, b)) and not distance.state_dict()


def test_lpips_by_name(squeeze):
    _, path = squeeze
    distance = load_perceptual("lpips-squeeze", weights=path, size=40)
    a, b = pair(1, 3, 24, 24)
    assert isinstance(distance, LPIPS)
    assert torch.equal(distance(a, b), load_lpips(trunk="squeeze", weights=path, size=40)(a, b))


def test_features_that_resize_by_themselves_do_so_to_the_size():
    distance = load_perceptual("lite0", size=64)
    a, _ = pair(1, 3, 32, 32)
    assert [m.shape[-1] for m in distance.maps(a)] == [16, 8, 4, 2]
    assert [m.shape[-1] for m in load_perceptual("lite0").maps(a)] == [56, 28, 14, 7]


def test_over_features():
    digits = load_features("digits")
    x, y = torch.rand(2, 3, 1, 8, 8) * 2 - 1
    x.requires_grad_()
    distance = perceptual(x, y, digits.maps)
    distance.sum().backward()
    assert distance.shape == (3,) and (distance > 0).all() and float(x.grad.abs().sum()) > 0


def test_enlarged():
    x = torch.rand(2, 1, 8, 8)
    big = enlarged(x)
    assert big.shape == (2, 3, 224, 224) and torch.equal(big[:, 0], big[:, 2])
    assert torch.allclose(big.mean(), x.mean(), atol=0.02)
