"""DD-GAN's critic: published sizes, what its logits depend on, and derivatives."""

import pytest
import torch

from d2o.critics.build import build_critic
from d2o.critics.dd_gan import DDGANCritic, critic_widths
from d2o.errors import UserError
from d2o.networks.build import count_parameters
from tests.networks.test_ncsnpp_z import perturbed


def critic(resolution: int = 8, **more) -> DDGANCritic:
    torch.manual_seed(0)
    return perturbed(DDGANCritic(resolution, 1, **{"width": 8, "temb": 16, **more}))


def test_the_critic_s_rule_gives_the_published_ones():
    assert critic_widths(32, "small", 64) == [(128, False), (256, True), (512, True), (512, True)]
    assert critic_widths(256, "large", 64) == [(256, True), *[(512, True)] * 5]
    assert critic_widths(8, "small", 64) == [(128, False), (256, True)]
    assert critic_widths(28, "small", 1) == [(2, False), (4, True), (8, True)]  # 7 pixels cannot be halved
    assert [len(critic(size).blocks) for size in (4, 8, 64, 128)] == [1, 2, 5, 5]


@pytest.mark.parametrize(("kind", "resolution"), [("small", 8), ("large", 16)])
def test_the_critic_answers_to_everything_and_differentiates_twice(kind, resolution):
    network = critic(resolution, kind=kind)
    x, y = torch.randn(2, 8, 1, resolution, resolution)
    t = torch.arange(8) % 4
    logits = network(x.requires_grad_(), t, y)
    assert logits.shape == (8,)
    for changed in (network(y, t, y), network(x, t.flip(0), y), network(x, t, x)):
        assert not torch.allclose(changed, logits, atol=1e-4)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    with_gradient = [name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert {
        "input.weight",
        "blocks.0.conv0.weight",
        "blocks.1.skip.weight",
        "final.weight",
        "output.weight",
        "time1.weight",
    } <= set(with_gradient)


def test_gradients_of_the_gradient_are_right():
    network = critic(4).double()
    x, y, t = *torch.randn(2, 4, 1, 4, 4, dtype=torch.float64), torch.arange(4)
    assert torch.autograd.gradgradcheck(lambda x: network(x, t, y), x.requires_grad_(), atol=1e-5)


def test_published_sizes():
    with torch.device("meta"):
        small, large = DDGANCritic(32, 3), DDGANCritic(256, 3)
        assert (count_parameters(small), count_parameters(large)) == (12_741_633, 27_737_217)
        x, t = torch.empty(2, 3, 256, 256), torch.zeros(2, dtype=torch.int64)
        assert large(x, t, x).shape == (2,)


def test_at_first_it_is_undecided():
    torch.manual_seed(0)
    x, t = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert DDGANCritic(8, 1, width=8)(x, t, x).abs().max() < 0.01


def test_it_is_told_classes():
    judge, x, t = critic(classes=3), torch.randn(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    one, other = (judge(x, t, x, torch.tensor(labels)) for labels in ([0, 1, 2], [2, 0, 1]))
    assert not torch.allclose(one, other, atol=1e-6)


def test_it_is_rebuilt_from_its_configuration():
    x, t, network = torch.randn(4, 1, 8, 8), torch.arange(4), critic()
    again = build_critic(network.config)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, t, x), network(x, t, x))


def test_an_unknown_kind():
    with pytest.raises(UserError, match="kind must be"):
        build_critic({"arch": "ddgan_critic", "img_resolution": 8, "img_channels": 1, "kind": "huge"})
