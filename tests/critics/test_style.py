"""StyleGAN2's critic: what its logits depend on, and derivatives."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from d2o.critics.style import StyleCritic
from d2o.errors import UserError
from d2o.networks.build import count_parameters

TINY = {"base": 64, "max_channels": 6}


def critic(**more):
    torch.manual_seed(0)
    return StyleCritic(8, 1, **{**TINY, "time_dim": 8, "cmap_dim": 6, "mbstd_group": 2, **more})


def test_residual_block_halves_the_power_of_both_branches():
    block, x, emb = critic(blocks="resnet").blocks[0], torch.randn(2, 6, 8, 8), torch.randn(2, 8)
    y = block.conv1(block.conv0(x, block.time(emb)))
    assert torch.allclose(block(x, emb), (y + block.skip(x)) / math.sqrt(2), atol=1e-5)
    # The time is added to the bias, before the activation.
    conv = block.conv0
    by_hand = F.leaky_relu(
        F.conv2d(x, conv.weight * conv.gain, padding=1) + block.time(emb)[:, :, None, None], 0.2
    ) * math.sqrt(2)
    assert torch.allclose(conv(x, block.time(emb)), by_hand, atol=1e-5)


@pytest.mark.parametrize("blocks", ["orig", "resnet"])
@pytest.mark.parametrize("time", ["block_add", "cmap"])
def test_critic_depends_on_time(blocks, time):
    network, x = critic(blocks=blocks, time=time), torch.randn(4, 1, 8, 8)
    early = network(x, 0.1)
    assert early.shape == (4,)
    assert torch.equal(early, network(x, torch.full((4,), 0.1))) and torch.equal(early, network(x, torch.tensor(0.1)))
    assert (network(x, 0.9) - early).abs().max() > 1e-3
    assert (network(x, 0.101) - early).abs().max() > 1e-4  # high frequencies are alive
    with pytest.raises(UserError, match="needs t"):
        network(x)


def test_critic_without_time_ignores_it():
    network, x = critic(time="none"), torch.randn(4, 1, 8, 8)
    assert torch.equal(network(x), network(x, 0.3))


def test_critic_with_classes():
    for time in ("none", "cmap", "block_add"):
        network, x = critic(time=time, label_dim=3), torch.randn(4, 1, 8, 8)
        labels = torch.tensor([0, 1, 2, -1])
        same = network(x, 0.5, labels)
        assert (network(x, 0.5, labels.flip(0)) - same).abs().min() > 1e-5
        assert (same[3] == 0) == (time != "cmap")
        with pytest.raises(UserError, match="3 classes"):
            network(x, 0.5)


def test_critic_sees_a_lack_of_variety_only_with_minibatch_std():
    x = torch.randn(1, 1, 8, 8)
    others = torch.randn(3, 1, 8, 8)
    for group, sees in ((4, True), (None, True), (0, False)):
        network = critic(mbstd_group=group, time="none")
        alone, among = network(x.expand(4, -1, -1, -1))[0], network(torch.cat([x, others]))[0]
        assert torch.allclose(alone, among, atol=1e-5) != sees


def test_critic_refuses_unknown_switches():
    with pytest.raises(UserError, match=r"network\.blocks"):
        critic(blocks="residual")
    with pytest.raises(UserError, match=r"network\.time"):
        critic(time="add")
    with pytest.raises(UserError, match="time_dim"):
        critic(time_dim=3)


@pytest.mark.long
@pytest.mark.parametrize("blocks", ["orig", "resnet"])
def test_critic_is_twice_differentiable(blocks):
    network = critic(blocks=blocks, base=16, max_channels=2).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: network(x, 0.4).square(), (x,))


def test_it_says_how_it_was_built():
    network = critic(blocks="resnet", time="cmap", label_dim=2)
    config = dict(network.config)
    assert config.pop("arch") == "style_critic"
    again = StyleCritic(**config)
    again.load_state_dict(network.state_dict())
    assert again.config == network.config


def test_published_sizes():
    with torch.device("meta"):
        plain = StyleCritic(32, 3, time="none")
        residual = StyleCritic(256, 3, "resnet", 16384, mbstd_group=8, time="none")
    conv = lambda a, b, k=3: a * b * k * k  # noqa: E731
    tail = conv(513, 512) + 512 + (8192 * 512 + 512) + 513
    assert count_parameters(plain) == 4 * 512 + 6 * (conv(512, 512) + 512) + tail == 20_720_641
    widths = [512, 512, 512, 512, 256, 128, 64]
    blocks = sum(conv(b, b) + b + conv(b, a) + a + conv(b, a, 1) for a, b in pairwise(widths))
    assert count_parameters(residual) == 4 * 64 + blocks + tail
