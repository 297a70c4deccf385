"""Perceptual distances: over any maps, and LPIPS over its three trunks."""

import pytest
import torch
from torch import nn

from d2o.features import load_features
from d2o.features.lpips import untrained_lpips
from d2o.losses.perceptual import TINY, enlarged, load_lpips, perceptual, unit


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


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, of what lpips gives it
def test_squeezenet_is_the_package_s(tmp_path):
    """The other two are compared where the evaluation has them."""
    torch.manual_seed(0)
    theirs = untrained_lpips("squeeze").eval()
    names = theirs.net.state_dict()
    torch.save({f"features.{name.partition('.')[2]}": value for name, value in names.items()}, tmp_path / "squeeze.pth")
    ours = load_lpips(trunk="squeeze", weights=tmp_path / "squeeze.pth")
    a, b = torch.rand(2, 2, 3, 40, 40) * 2 - 1
    with torch.no_grad():
        expected = theirs(a, b).flatten()
        assert expected.min() > 1e-3 and torch.allclose(ours(a, b), expected, rtol=1e-5)
        grey = ours(a[:, :1], b[:, :1])
        assert torch.allclose(grey, ours(a[:, :1].expand(-1, 3, -1, -1), b[:, :1].expand(-1, 3, -1, -1)))
    assert not list(ours.parameters()) and not ours.state_dict()
    a.requires_grad_()
    ours(a, b).sum().backward()
    assert float(a.grad.abs().sum()) > 0
    pooled = load_lpips(trunk="squeeze", pooling="avg", weights=tmp_path / "squeeze.pth")
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in pooled.modules())
    assert (pooled(a, b) - expected).abs().min() > 1e-4


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
