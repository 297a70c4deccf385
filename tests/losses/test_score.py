"""SiD's and SiDA's losses against the published code's numbers, and the parts against their definitions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from d2o.diffusion.schedules import karras_sigma
from d2o.errors import UserError
from d2o.losses import score as losses
from d2o.teachers.registry import load_teacher

GOLDEN = Path(__file__).parents[1] / "golden"


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To 1e-4 of the largest value."""
    assert (found.detach() - wanted.reshape(found.shape)).abs().max() < 1e-4 * wanted.abs().max()


@pytest.fixture(scope="module")
def golden():
    """The true score, the score network that the numbers were made with (all of the former times 1.01), and the
    numbers."""
    true = load_teacher(GOLDEN / "edm" / "edm-ddpmpp.pkl").network
    fake = copy.deepcopy(true)
    for name, value in fake.state_dict().items():
        if "resample_filter" not in name and "freqs" not in name:
            value.mul_(1.01)
    return true, fake, load_file(GOLDEN / "sid" / "edm-ddpmpp.safetensors")


@pytest.fixture(scope="module")
def student_step(golden):
    true, fake, numbers = golden
    x = numbers["x_g"].clone().requires_grad_()
    sigma = karras_sigma(1 - 0.8 * numbers["t_uniform"])
    x_t = x + sigma * numbers["eps"]
    denoised, logits = fake(x_t, sigma.flatten(), numbers["label"], part="encoder_decoder")
    return x, true(x_t, sigma.flatten(), numbers["label"]), denoised, logits


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_s_loss_and_gradient_agree_with_the_published_code(golden, student_step, alpha):
    x, true, fake, _ = student_step
    loss = losses.sid_loss(x, true, fake, alpha)
    near(loss, golden[2][f"sid_loss_alpha{alpha}"])
    near(torch.autograd.grad(loss.sum(), x, retain_graph=True)[0], golden[2][f"sid_grad_alpha{alpha}"])
    # Algorithm 1 writes the same otherwise.
    delta, weight = true - fake, losses.mean_error(x, true)
    torch.testing.assert_close(loss, ((1 - alpha) * delta**2 + delta * (fake - x)) / weight, rtol=1e-3, atol=1e-6)


def test_sida_s_loss_and_gradient_agree_with_the_published_code(golden, student_step):
    x, true, fake, logits = student_step
    numbers, batch = golden[2], len(x)
    weight = losses.mean_error(x, true)
    adversarial = losses.generator_adversarial(logits, size=batch) / weight.flatten()
    near(adversarial, numbers["sida_gan_per_image"])
    total = (
        0.5 * 100 / batch * losses.sid_loss(x, true, fake, 1.0).sum()
        + 0.5 * 0.01 / batch * x[0].numel() * adversarial.sum()
    )
    near(total, numbers["sida_total"])
    near(torch.autograd.grad(total, x, retain_graph=True)[0], numbers["sida_grad"])


def test_the_score_network_s_losses_agree_with_the_published_code(golden):
    _, network, numbers = golden
    sigma, label = losses.lognormal_sigma(numbers["normal"]), numbers["label"]
    noise, weight = sigma * numbers["eps"], losses.edm_weight(sigma)
    denoised, fake = network(numbers["x_g"] + noise, sigma.flatten(), label, part="encoder_decoder")
    real = network(numbers["x_real"] + noise, sigma.flatten(), label, part="encoder")
    near(losses.denoising_loss(denoised, numbers["x_g"], sigma), numbers["psi_score_loss"])
    near(losses.critic_adversarial(real, fake, 6, weight, weight), numbers["psi_disc_loss"])
    denoised, logits = network(numbers["x_g"], torch.ones(6), label, part="encoder_decoder")
    near(denoised, numbers["fake_denoised_sigma1"])
    near(logits, numbers["fake_logits_sigma1"])


def test_noise_levels():
    sigma = karras_sigma(1 - torch.tensor([0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0]))
    wanted = torch.tensor([0.002, 0.08509, 0.96542, 2.51522, 5.83895, 24.40834, 80.0])  # of the published code
    torch.testing.assert_close(sigma, wanted, rtol=1e-4, atol=1e-5)
    assert float(karras_sigma(torch.tensor(0.5), 1.0, 3.0, 1.0)) == pytest.approx(2.0)
    assert float(losses.lognormal_sigma(torch.tensor(0.0))) == pytest.approx(0.3012, abs=1e-4)


def test_groups_are_averaged_and_dropped_samples_do_not_count():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 7.0])
    assert losses.batch_pool(values, 3).tolist() == [2, 2, 2, 6, 6, 6]
    assert losses.batch_pool(values, 2).tolist() == [1.5, 1.5, 4.5, 4.5, 6, 6]
    assert torch.equal(losses.batch_pool(values, 1), values)
    keep = torch.tensor([True, True, False, False, False, False])
    assert losses.batch_pool(values * torch.tensor([1, 1, torch.nan, 1, 1, 1]), 3, keep).tolist() == [
        1.5,
        1.5,
        1.5,
        0,
        0,
        0,
    ]


def test_forms_of_the_student_s_adversarial_loss():
    logits = torch.linspace(-20, 20, 12).reshape(3, 1, 2, 2).requires_grad_()
    D = torch.sigmoid(logits.detach().clamp(-10, 10)).double()
    for kind, wanted in (("nonsat_bce", -D.log()), ("linear_fakeness", 1 - D), ("saturating", (1 - D).log())):
        found = losses.generator_adversarial(logits, 1, kind)
        torch.testing.assert_close(found.double(), wanted.flatten(1).mean(1), rtol=1e-3, atol=1e-6)
        gradient = torch.autograd.grad(found.sum(), logits)[0].flatten()
        assert (gradient <= 0).all() and gradient[0] == 0  # more real is always better; a map far outside gives nothing
        assert (
            torch.autograd.grad(losses.generator_adversarial(logits, 1, kind, clamp=None).sum(), logits)[0].flatten()[5]
            < 0
        )
    with pytest.raises(UserError, match="did you mean 'saturating'"):
        losses.generator_adversarial(logits, 1, "saturatin")


def test_uncertainty_divides_the_losses():
    torch.manual_seed(0)
    a, b, sigma, u = (
        torch.randn(2, 1, 4, 4),
        torch.randn(2, 1, 4, 4),
        torch.tensor([0.5, 2.0])[:, None, None, None],
        torch.randn(2, 1, 1, 1),
    )
    plain = losses.denoising_loss(a, b, sigma)
    torch.testing.assert_close(losses.denoising_loss(a, b, sigma, logvar=u), plain / u.exp() + u)
    torch.testing.assert_close(losses.mean_error(a, b, u), (a - b).abs().mean((1, 2, 3), keepdim=True) * u.exp())
    assert float(losses.mean_error(a, a).max()) == pytest.approx(1e-5)
    weight = losses.edm_weight(sigma, logvar=u)
    wanted = 0.5 * (F.softplus(-a).mean() + F.softplus(b).mean()) * (sigma**-2 + 4).flatten() / u.flatten().exp()
    torch.testing.assert_close(losses.critic_adversarial(a, b, 2, weight, weight), wanted)
