import math

import pytest
import torch
from torch.nn import functional as F

from d2o.critics.style import StyleCritic
from d2o.errors import UserError
from d2o.losses.adversarial import (
    PathLength,
    critic_loss,
    fake_loss,
    generator_loss,
    path_lengths,
    r1_penalty,
    real_loss,
    squared_gradient,
)
from d2o.networks.style import StyleSynthesis


def test_logistic_losses():
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 3.0])
    assert torch.allclose(critic_loss(real, fake), -F.logsigmoid(real) - torch.log(1 - fake.sigmoid()), atol=1e-6)
    assert torch.allclose(generator_loss(fake), -fake.sigmoid().log(), atol=1e-6)
    assert torch.allclose(generator_loss(fake, "saturating"), torch.log(1 - fake.sigmoid()), atol=1e-5)
    assert torch.allclose(generator_loss(fake, "linear_fakeness"), 1 - fake.sigmoid())
    assert torch.allclose(critic_loss(torch.zeros(5), torch.zeros(5)), torch.full((5,), 2 * math.log(2)))
    # Non-saturating: a generator that is found out still has a gradient.
    lost = torch.tensor([-40.0], requires_grad=True)
    assert torch.autograd.grad(generator_loss(lost).sum(), lost)[0].item() == pytest.approx(-1)


def test_hinge_losses():
    real, fake = torch.tensor([0.25, 2.0]), torch.tensor([-1.5, 3.0])
    assert critic_loss(real, fake, "hinge").tolist() == [0.75, 4.0]
    assert generator_loss(fake, "hinge").tolist() == [1.5, -3.0]


@pytest.mark.parametrize("kind", ["nonsaturating", "hinge"])
def test_several_logits_of_an_image_are_averaged(kind):
    torch.manual_seed(0)
    real, fake = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    by_hand = [critic_loss(r.flatten(), f.flatten(), kind).mean() for r, f in zip(real, fake)]
    assert torch.allclose(critic_loss(real, fake, kind), torch.stack(by_hand), rtol=1e-5)
    assert torch.allclose(real_loss(real, kind) + fake_loss(fake, kind), critic_loss(real, fake, kind))
    assert torch.allclose(generator_loss(fake, kind)[1], generator_loss(fake[1].flatten(), kind).mean(), rtol=1e-5)


def test_unknown_forms_are_named():
    x = torch.zeros(2)
    with pytest.raises(UserError, match="did you mean 'hinge'"):
        critic_loss(x, x, "hing")
    with pytest.raises(UserError, match="'wasserstein'"):
        generator_loss(x, "wasserstein")
    with pytest.raises(UserError, match="form of the critic's loss"):
        real_loss(x, "saturating")  # the generator's alone


def test_r1_of_each_image():
    x, w, labels = torch.randn(6, 3, 4, 4), torch.randn(3, 4, 4), torch.arange(6)
    linear = r1_penalty(lambda x, _: (x * w).sum((1, 2, 3)), x)
    assert torch.allclose(linear, w.square().sum().expand(6), rtol=1e-5)
    square = r1_penalty(lambda x, _: x.square().flatten(1) / 2, x)  # the sum over all logits of an image
    assert torch.allclose(square, x.square().sum((1, 2, 3)), rtol=1e-5)
    told = r1_penalty(lambda x, labels: labels * x.sum((1, 2, 3)), x, labels)
    assert torch.allclose(told, 48.0 * labels.square())
    assert not x.requires_grad
    asked = x.clone().requires_grad_()
    assert torch.equal(squared_gradient(asked.square().flatten(1) / 2, asked), square)


def along(module, loss, seed=1, eps=1e-6):
    """The derivative of loss() along a random direction of all parameters: by autograd, and by finite differences."""
    g = torch.Generator().manual_seed(seed)
    parameters = list(module.parameters())
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    grads = torch.autograd.grad(loss(), parameters, allow_unused=True)
    exact = sum((d * v).sum() for d, v in zip(grads, direction) if d is not None).item()
    values = []
    for sign in (1, -1):
        for p, v in zip(parameters, direction):
            p.data += sign * eps * v
        values.append(loss().item())
        for p, v in zip(parameters, direction):
            p.data -= sign * eps * v
    return exact, (values[0] - values[1]) / (2 * eps)


@pytest.mark.parametrize("blocks, time", [("orig", "block_add"), ("resnet", "cmap")])
def test_r1_trains_the_critic_in_the_right_direction(blocks, time):
    torch.manual_seed(0)
    critic = StyleCritic(
        8, 1, blocks, base=64, max_channels=6, mbstd_group=2, time=time, time_dim=8, cmap_dim=6
    ).double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    exact, measured = along(critic, lambda: r1_penalty(lambda x, _: critic(x, 0.6), x).mean())
    assert exact == pytest.approx(measured, rel=1e-5) and abs(exact) > 1e-6


@pytest.mark.parametrize("modulation", ["grouped", "scale"])
def test_path_length_trains_the_generator_in_the_right_direction(modulation):
    torch.manual_seed(0)
    network = StyleSynthesis(8, 1, w_dim=5, base=64, max_channels=6, modulation=modulation).double()
    ws = network.broadcast(torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    y = torch.randn(3, 1, 8, 8, dtype=torch.float64)

    def loss():
        penalty = PathLength(decay=0.0).double()
        penalty.mean.fill_(0.1)
        return penalty(network(ws, "const"), ws, noise=y)

    exact, measured = along(network, loss)
    assert exact == pytest.approx(measured, rel=1e-5) and abs(exact) > 1e-6


def test_path_lengths_of_a_linear_generator():
    torch.manual_seed(0)
    ws, a, y = torch.randn(4, 3, 5, requires_grad=True), torch.randn(5, 2 * 16), torch.randn(4, 2, 4, 4)
    images = (ws[:, 0] @ a).reshape(4, 2, 4, 4)  # only the first of three inputs counts
    expected = (y.flatten(1) / 4 @ a.t()).norm(dim=1) / math.sqrt(3)
    assert torch.allclose(path_lengths(images, ws, noise=y), expected, rtol=1e-5)
    draws = [path_lengths((ws[:, 0] @ a).reshape(4, 2, 4, 4), ws, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)


def test_the_gradient_goes_through_the_running_mean():
    """As in the authors' code: of (l - a)^2 with a = 0.9 a_0 + 0.1 mean l, whatever share of the batch a process
    has."""
    y, ws = torch.ones(4, 1, 2, 2), torch.ones(4, 1, 1)
    start, decay = 3.0, 0.1

    def lengths_of(scale):  # J^T y = 2 scale for each image
        styles = ws[: len(scale)].clone().requires_grad_()
        return path_lengths(
            scale[:, None, None, None] * styles[..., None].expand(-1, 1, 2, 2), styles, noise=y[: len(scale)]
        )

    def gradient(loss_of):
        scale = torch.tensor([0.5, 1.0, 2.0, 3.0], requires_grad=True)
        return torch.autograd.grad(loss_of(scale), scale)[0]

    def attached(scale):
        lengths = lengths_of(scale)
        return (lengths - (0.9 * start + 0.1 * lengths.mean())).square().mean()

    def detached(scale):
        lengths = lengths_of(scale)
        return (lengths - (0.9 * start + 0.1 * lengths.mean().detach())).square().mean()

    def ours(scale, whole=None):
        penalty = PathLength(decay)
        penalty.mean.fill_(start)
        styles = ws[: len(scale)].clone().requires_grad_()
        images = scale[:, None, None, None] * styles[..., None].expand(-1, 1, 2, 2)
        return penalty(images, styles, noise=y[: len(scale)], share=lambda mean: mean if whole is None else whole)

    expected = gradient(attached)
    assert torch.allclose(gradient(ours), expected, rtol=1e-5)
    assert not torch.allclose(gradient(detached), expected, rtol=1e-2)
    mean = lengths_of(torch.tensor([0.5, 1.0, 2.0, 3.0])).mean().detach()
    two_processes = gradient(lambda scale: (ours(scale[:2], mean) + ours(scale[2:], mean)) / 2)
    assert torch.allclose(two_processes, expected, rtol=1e-5)
    assert torch.allclose(ours(torch.tensor([0.5, 1.0, 2.0, 3.0])), attached(torch.tensor([0.5, 1.0, 2.0, 3.0])))


def test_running_mean_of_lengths_is_explicit_state():
    penalty = PathLength()
    ws = torch.ones(2, 1, 1, requires_grad=True)
    y = torch.full((2, 1, 2, 2), 2.0)
    lengths = lambda scale: (scale * ws[:, 0, :, None, None]).expand(2, 1, 2, 2)  # noqa: E731  J^T y = 4 scale
    assert penalty(lengths(1.0), ws, noise=y).item() == pytest.approx((4 - 0.04) ** 2, rel=1e-5)
    assert penalty.mean.item() == pytest.approx(0.04)
    again = PathLength()
    again.load_state_dict(penalty.state_dict())
    assert again(lengths(2.0), ws, noise=y).item() == pytest.approx((8 - (0.04 * 0.99 + 0.08)) ** 2, rel=1e-5)
    assert not again.mean.requires_grad
