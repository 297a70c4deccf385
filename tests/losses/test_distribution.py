"""The gradient of distribution matching against the papers' formulas, and the noise levels."""

from __future__ import annotations

import pytest
import torch

from d2o.losses.distribution import LEVELS, index_sigma, matching_gradient, surrogate


def images(seed: int, n: int = 5) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_gradient_of_dmd_is_the_difference_of_the_scores_with_its_weight():
    """Yin et al. 2024, eq. 7 and 8: w_t (s_fake - s_real), w_t = sigma^2 CHW / |x - D_real|_1, with s = (D - x_t) /
    sigma^2."""
    x, real, fake, eps = (images(i) for i in range(4))
    sigma = torch.linspace(0.3, 3, 5, dtype=torch.float64)[:, None, None, None]
    x_t = x + sigma * eps
    s_real, s_fake = (real - x_t) / sigma**2, (fake - x_t) / sigma**2
    weight = sigma**2 * 48 / (x - real).abs().sum((1, 2, 3), keepdim=True)
    found = matching_gradient(x, real, fake)
    assert torch.allclose(found.double(), weight * (s_fake - s_real), rtol=1e-5, atol=1e-6)
    assert torch.allclose(
        matching_gradient(x, real, fake, "none").double(), sigma**2 * (s_fake - s_real), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("reduce", "count"), [("mean", 48), ("sum", 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_the_surrogate_s_gradient_is_the_given_one(reduce, count, scale):
    x, g = (10 * images(0)).float().requires_grad_(), scale * images(1).float()
    loss = surrogate(x, g, reduce)
    loss.mean().backward()
    assert torch.allclose(x.grad, g / (5 * count), rtol=1e-6, atol=0)
    plain = 0.5 * g.double().square().sum((1, 2, 3)) / count  # 1/2 |x - sg[x - g]|^2
    assert torch.allclose(loss.double(), plain, rtol=1e-5)


def test_the_gradient_flows_neither_to_the_networks_nor_to_the_weight():
    x, real, fake = (images(i).requires_grad_() for i in range(3))
    g = matching_gradient(x, real, fake)
    assert not g.requires_grad
    surrogate(x, g).sum().backward()
    assert real.grad is None and fake.grad is None and x.grad is not None
    same = images(0)
    assert (
        matching_gradient(same, same, fake) == 0
    ).all()  # a weight of infinity: the sample is left out, not the batch lost


def test_a_step_against_the_gradient_brings_the_student_s_gaussian_to_the_teacher_s():
    """x ~ N(m, 1) and the teacher's N(0, 1), whose denoisers are known: the mean moves to 0 and the variance stays."""
    generator = torch.Generator().manual_seed(0)
    x, sigma = 2 + torch.randn(4000, 1, 1, 1, generator=generator), 1.0
    for _ in range(60):
        x_t = x + sigma * torch.randn(x.shape, generator=generator)
        mean, variance = x.mean(), x.var()
        fake = mean + variance / (variance + sigma**2) * (x_t - mean)
        x = x - 0.3 * matching_gradient(x, x_t / (1 + sigma**2), fake, "none")
    assert abs(x.mean()) < 0.05 and abs(x.var() - 1) < 0.1


def test_noise_levels():
    ends = index_sigma(torch.tensor([0, LEVELS - 1]))
    assert torch.allclose(ends, torch.tensor([0.002, 80.0]), rtol=1e-5)
    sigma = index_sigma(torch.arange(LEVELS))
    assert (sigma.diff() > 0).all()
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)  # Karras et al. 2022, eq. 5 with i counted from the highest
    assert sigma[980].item() == pytest.approx((high + 19 / 999 * (low - high)) ** 7, rel=1e-4)
