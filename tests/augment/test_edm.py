"""EDM's augmentation: what the labels say is what was done."""

from __future__ import annotations

import math

import pytest
import torch

from d2o.augment.ada import numbers
from d2o.augment.edm import LABELS, augment


def ramp(batch: int, size: int = 16) -> torch.Tensor:
    """A smooth bump, off centre."""
    at = torch.arange(size) - (size - 1) / 2
    bump = torch.exp(-((at[None, :] - 2) ** 2 + (at[:, None] + 1) ** 2) / 18)
    return bump.expand(batch, 1, size, size).clone()


def test_with_p_0_images_are_only_mirrored_and_the_label_says_so():
    x = torch.randn(200, 3, 16, 16)
    y, labels = augment(x, 0.0, *numbers(200, torch.Generator().manual_seed(0)))
    assert labels.shape == (200, LABELS) and not labels[:, 1:].any()
    flipped = labels[:, 0] == 1
    assert 0.35 < flipped.float().mean() < 0.65
    assert torch.equal(y[flipped], x[flipped].flip(3)) and torch.equal(y[~flipped], x[~flipped])


def test_shares_and_spreads():
    _, labels = augment(torch.zeros(4000, 1, 4, 4), 0.12, *numbers(4000, torch.Generator().manual_seed(0)))
    happened = (labels != 0).float().mean(0)
    wanted = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.06, 0.12, 0.12])
    assert (happened - wanted).abs().max() < 0.025
    for column in (2, 7, 8):
        assert labels[:, column][labels[:, column] != 0].std().item() == pytest.approx(1, abs=0.12)
    length = labels[:, 5:7].norm(dim=1)
    assert length[length > 0].square().mean().sqrt().item() == pytest.approx(1, abs=0.12)
    turned = labels[:, 4] != 0
    assert torch.allclose(
        (labels[turned, 3] + 1) ** 2 + labels[turned, 4] ** 2, torch.ones(int(turned.sum())), atol=1e-5
    )


def script(gates: list[int], uniform: list[float], normal: list[float]):
    """randn, rand that make chosen things happen to one image: up-down flip, scale, rotation, stretching, shift."""
    answers = iter([torch.tensor([[0.0 if gate else 1.0 for gate in gates]]), torch.tensor([uniform])])
    return lambda *shape: torch.tensor([normal]), lambda *shape: next(answers)


def moments(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean x, y from the centre; spreads x, y)"""
    size = image.shape[-1]
    at, mass = torch.arange(size) - (size - 1) / 2, image[0, 0].clamp(min=0) / image[0, 0].clamp(min=0).sum()
    mean = torch.stack([(mass.sum(0) * at).sum(), (mass.sum(1) * at).sum()])
    return mean, torch.stack(
        [(mass.sum(0) * (at - mean[0]) ** 2).sum().sqrt(), (mass.sum(1) * (at - mean[1]) ** 2).sum().sqrt()]
    )


PLAIN = [0.9, 0.9, 0.5, 0.5, 0.9]  # no flips, angle 0, direction 0


@pytest.mark.parametrize(
    ("gates", "uniform", "normal", "label", "centre"),
    [
        ([0, 0, 0, 0, 1], PLAIN, [0, 0, 1.0, -0.5], [0, 0, 0, 0, 0, 0, 0, 1.0, -0.5], (2 + 4, -1 - 2)),
        ([0, 1, 0, 0, 0], PLAIN, [1.5, 0, 0, 0], [0, 0, 1.5, 0, 0, 0, 0, 0, 0], (2 * 2**0.3, -(2**0.3))),
        (
            [0, 0, 1, 0, 0],
            [0.9, 0.9, 0.75, 0.5, 0.9],
            [0, 0, 0, 0],
            [0, 0, 0, -1, 1, 0, 0, 0, 0],
            (-1, -2),
        ),  # a quarter, counter-clockwise as seen
        ([1, 0, 0, 0, 0], [0.1, 0.1, 0.5, 0.5, 0.9], [0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0], (-2, 1)),
        ([0, 0, 0, 1, 0], PLAIN, [0, 1.5, 0, 0], [0, 0, 0, 0, 0, 1.5, 0, 0, 0], (2 * 2**0.3, -(2**-0.3))),
        (
            [0, 0, 0, 1, 0],
            [0.9, 0.9, 0.5, 0.75, 0.1],
            [0, 1.5, 0, 0],
            [0, 0, 0, 0, 0, 0, 1.5, 0, 0],
            (2 * 2**-0.3, -(2**0.3)),
        ),
    ],
)
def test_each_transform_moves_the_image_as_its_label_says(gates, uniform, normal, label, centre):
    x = ramp(1, 32)
    y, labels = augment(x, 0.5, *script(gates, uniform, normal))
    torch.testing.assert_close(labels, torch.tensor([label], dtype=torch.float32), atol=1e-5, rtol=0)
    assert y.dtype == torch.float32 and y.shape == x.shape
    torch.testing.assert_close(moments(y)[0], torch.tensor(centre, dtype=torch.float32), atol=0.25, rtol=0)


def test_angles_are_uniform_and_gradients_pass():
    x = ramp(8).requires_grad_()
    y, _ = augment(x, 1.0, *numbers(8, torch.Generator().manual_seed(3)))
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    _, labels = augment(torch.zeros(2000, 1, 4, 4), 1.0, *numbers(2000, torch.Generator().manual_seed(0)))
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)
    assert angle.abs().max() <= math.pi and angle.std().item() == pytest.approx(math.pi / 3**0.5, abs=0.08)
