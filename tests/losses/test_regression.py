import math

import pytest
import torch

from d2o.losses.perceptual import perceptual
from d2o.losses.regression import LOSSES, l1, mse, pseudo_huber


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_equality_and_one_value_per_sample(name):
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(LOSSES[name](x, x), torch.zeros(3))
    assert LOSSES[name](x, x + 1).shape == (3,)


def test_values_by_hand():
    x, y = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, -2.0], [3.0, 0.0]]]])
    assert mse(x, y).item() == pytest.approx(14 / 4)
    assert l1(x, y).item() == pytest.approx(6 / 4)
    c = 0.00054 * 2
    assert pseudo_huber(x, y).item() == pytest.approx(math.sqrt(14 + c * c) - c)
    assert pseudo_huber(x, y, "element").item() == pytest.approx(
        sum(math.sqrt(v * v + c * c) - c for v in (1, -2, 3, 0)) / 4
    )


def test_pseudo_huber_has_a_gradient_at_equality():
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    pseudo_huber(x, torch.zeros(1, 1, 2, 2)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_perceptual_ignores_the_scale_of_features_and_has_gradients():
    maps = lambda x: [x, x[:, :, ::2, ::2]]  # noqa: E731
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = torch.randn(2, 3, 4, 4)
    assert torch.allclose(perceptual(x, 5 * x, maps), torch.zeros(2), atol=1e-5)
    value = perceptual(x, y, maps)
    f, g = x.detach() / x.detach().norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    by_hand = sum(
        (a - b).square().sum(1).flatten(1).mean(1) for a, b in ((f, g), (f[:, :, ::2, ::2], g[:, :, ::2, ::2]))
    )
    assert torch.allclose(value, by_hand, atol=1e-5)
    value.sum().backward()
    assert x.grad.abs().sum() > 0
