import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from d2o.errors import UserError
from d2o.networks.build import count_parameters
from d2o.networks.fir import up2
from d2o.networks.minibatch_std import MinibatchStd, group_size, minibatch_std
from d2o.networks.node import NODEMapping
from d2o.networks.style import StyleSynthesis, channel_table
from d2o.networks.style_layers import EqualizedConv2d, EqualizedLinear, ModulatedConv, modulated_conv
from d2o.training.gather import gather_pools

TINY = {"base": 64, "max_channels": 6}


def synthesis(seed=0, noise=0.5, **more):
    """8 px, with noise that counts."""
    torch.manual_seed(seed)
    network = StyleSynthesis(8, 1, w_dim=5, **{**TINY, **more})
    for name, p in network.named_parameters():
        if "noise_strength" in name:
            p.data.fill_(noise)
    return network


@pytest.mark.parametrize("lr_mult", [1.0, 0.01])
def test_equalised_layers_keep_unit_variance_whatever_their_size(lr_mult):
    torch.manual_seed(0)
    for width in (32, 512):
        layer = EqualizedLinear(width, 256, lr_mult=lr_mult, bias_init=3.0)
        y = layer(torch.randn(512, width))
        assert y.std().item() == pytest.approx(1, abs=0.15) and y.mean().item() == pytest.approx(3, abs=0.15)
        assert layer.weight.std().item() == pytest.approx(1 / lr_mult, rel=0.05)
    y = EqualizedConv2d(32, 64, 3, activate=False)(torch.randn(4, 32, 16, 16))
    assert y[:, :, 1:-1, 1:-1].std().item() == pytest.approx(1, abs=0.05)


def test_learning_rate_multiplier():
    """A step of Adam, the same for every parameter, moves what a layer of lr_mult 0.01 computes 100 times less."""
    x = torch.ones(1, 16)
    moved = []
    for lr_mult in (1.0, 0.01):
        layer = EqualizedLinear(16, 1, lr_mult=lr_mult)
        before = layer(x)
        with torch.no_grad():
            layer.weight += 0.5
            layer.bias += 0.5
        moved.append((layer(x) - before).item())
    assert moved[1] == pytest.approx(moved[0] / 100, rel=1e-3)


def test_activation_keeps_the_mean_square():
    x = torch.randn(100_000)
    y = EqualizedLinear(1, 1, activate=True)
    y.weight.data.fill_(1.0)
    assert y(x[:, None]).square().mean().item() == pytest.approx(1.04, abs=0.02)  # (1 + 0.2^2) / 2 * 2


def test_demodulated_convolution_has_unit_std():
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 20, 20), 7 * torch.randn(64, 64, 3, 3)
    styles = torch.randn(8, 64) * torch.logspace(-2, 2, 8)[:, None]
    for how in ("grouped", "scale"):
        y = modulated_conv(x, weight, styles, how=how)[:, :, 1:-1, 1:-1]
        assert torch.allclose(y.std((1, 2, 3)), torch.ones(8), atol=0.05)
    plain = modulated_conv(x, weight, styles, demodulate=False)[:, :, 1:-1, 1:-1].std((1, 2, 3))
    assert plain[-1] > 1000 * plain[0]


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_both_modulations_agree(up, demodulate, kernel):
    torch.manual_seed(0)
    x, weight, styles = torch.randn(3, 8, 6, 6), torch.randn(5, 8, kernel, kernel), torch.randn(3, 8)
    results = []
    for how in ("grouped", "scale", "auto"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, styles)]
        y = modulated_conv(*leaves, demodulate=demodulate, up=up, how=how)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert results[0][0].shape == ((3, 5, 10 + kernel, 10 + kernel) if up else (3, 5, 6, 6))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max().clamp(min=1)


def test_resampling_convolutions_are_aligned():
    """A kernel that is 1 at its centre leaves only the resampling."""
    x = torch.randn(2, 1, 8, 8)
    conv = ModulatedConv(1, 1, 4, up=True, demodulate=False)
    for p in conv.parameters():
        p.data.zero_()
    conv.affine.bias.data.fill_(1 / conv.gain)
    conv.weight.data[:, :, 1, 1] = 1
    assert torch.allclose(conv(x, torch.randn(2, 4)), up2(x, conv.taps), atol=1e-5)
    three, one = (EqualizedConv2d(1, 1, k, down=True, activate=False) for k in (3, 1))
    three.weight.data.zero_()[:, :, 1, 1] = 1 / three.gain
    one.weight.data.fill_(1.0)
    assert torch.allclose(three(x), one(x), atol=1e-6)
    assert three(x).shape == (2, 1, 4, 4)


def test_unknown_modulation():
    with pytest.raises(UserError, match="unknown modulation 'group'"):
        modulated_conv(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), torch.ones(1, 1), how="group")
    with pytest.raises(UserError, match=r"network\.modulation"):
        StyleSynthesis(8, 1, modulation="fast")


def test_minibatch_std():
    x = torch.randn(1, 4, 3, 3).expand(6, -1, -1, -1)
    y = minibatch_std(x, 3)
    assert y.shape == (6, 5, 3, 3) and y[:, 4].max() <= 1.01e-4 and torch.equal(y[:, :4], x)
    # Groups of 2 of 4 samples: {0, 2} and {1, 3}.
    x = torch.tensor([0.0, 1, 4, 1])[:, None, None, None].expand(-1, 2, 2, 2)
    assert torch.allclose(minibatch_std(x, 2)[:, 2, 0, 0], torch.tensor([2.0, 0, 2, 0]), atol=1e-3)
    assert torch.equal(MinibatchStd(2)(x), minibatch_std(x, 2))  # outside training
    std = x[:, 0, 0, 0].std(correction=0)
    for group in (None, 4, 100):
        assert torch.allclose(minibatch_std(x, group)[:, 2], std.expand(4, 2, 2))
    # Two channels: one statistic for each half of the input's.
    x = torch.cat([torch.zeros(4, 2, 2, 2), x], dim=1)
    assert torch.allclose(
        minibatch_std(x, 4, channels=2)[:, 4:, 0, 0], torch.stack([torch.tensor(1e-4), std]).expand(4, 2)
    )


@pytest.mark.parametrize("batch, group, effective", [(6, 4, 3), (5, 4, 1), (9, 6, 3), (8, 32, 8)])
def test_a_group_that_does_not_divide_the_batch_becomes_the_next_divisor(batch, group, effective):
    x = torch.randn(batch, 2, 3, 3)
    assert torch.equal(minibatch_std(x, group), minibatch_std(x, effective))
    assert group_size(group, batch) == effective
    assert group_size(0, batch) == 1 and group_size(None, batch) == batch


def test_groups_of_parts_of_a_batch_are_those_of_the_whole():
    """Parts that have whole groups need nothing of each other; others are put together, here by hand."""
    x = torch.randn(8, 2, 3, 3)
    gather_pools([module := MinibatchStd(4)], 0, 1)
    whole = module(x)
    assert torch.equal(whole, minibatch_std(x[[0, 4, 1, 5, 2, 6, 3, 7]], 4)[[0, 2, 4, 6, 1, 3, 5, 7]])
    assert torch.equal(torch.cat([module(part) for part in x.split(4)]), whole)
    assert not torch.equal(torch.cat([module(part) for part in x.split(2)]), whole)

    class Together:
        rank, world = 3, 4

        def __call__(self, mine):
            assert torch.equal(mine, x[6:])
            return x

    module.gather = Together()
    assert torch.equal(module(x[6:]), whole[6:]) and module(x[6:]).shape == (2, 3, 3, 3)
    assert not module.state_dict() and MinibatchStd(0)(x) is x


def test_channel_tables():
    assert channel_table(32, 32768) == {4: 512, 8: 512, 16: 512, 32: 512}
    assert channel_table(256, 16384) == {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64}
    for bad in (4, 12, 0):
        with pytest.raises(UserError, match="8, 16, 32"):
            channel_table(bad)
    with pytest.raises(UserError, match="no channel"):
        channel_table(64, 32)


def test_published_sizes():
    with torch.device("meta"):
        small, large = StyleSynthesis(32, 3), StyleSynthesis(256, 3, base=16384)
    assert (small.num_ws, large.num_ws, StyleSynthesis(8, 1, **TINY).num_ws) == (8, 14, 4)
    affine = lambda channels: 512 * channels + channels  # noqa: E731
    conv = lambda a, b, k=3: a * b * k * k  # noqa: E731
    style = lambda a, b: conv(a, b) + affine(a) + b + 1  # noqa: E731
    image = lambda c: conv(c, 3, 1) + affine(c) + 3  # noqa: E731
    assert count_parameters(small) == 512 * 16 + 7 * style(512, 512) + 4 * image(512) == 19_422_227
    widths = [512, 512, 512, 512, 256, 128, 64]
    tower = sum(style(a, b) + style(b, b) for a, b in pairwise(widths))
    assert count_parameters(large) == 512 * 16 + style(512, 512) + tower + sum(map(image, widths))


def test_noise_modes():
    network = synthesis()
    ws = network.broadcast(torch.randn(3, 5))
    draw = lambda seed, **kw: network(ws, generator=torch.Generator().manual_seed(seed), **kw)  # noqa: E731
    assert draw(0).shape == (3, 1, 8, 8)
    assert torch.equal(draw(0), draw(0)) and not torch.allclose(draw(0), draw(1))
    assert not torch.allclose(network(ws), network(ws))
    assert torch.equal(network(ws, "const"), network(ws, "const")) and torch.equal(
        network(ws, "none"), network(ws, "none")
    )
    assert not torch.allclose(network(ws, "const"), network(ws, "none"))
    noises = network.draw_noise(3, torch.Generator().manual_seed(0))
    assert torch.equal(network(ws, noises=noises), draw(0))
    one = network(ws[1:2], noises=[n[1:2] for n in noises])
    assert torch.allclose(one, draw(0)[1:2], atol=1e-5)
    assert "layers.0.noise_const" in network.state_dict()
    quiet = synthesis(noise=0.0)
    assert torch.equal(quiet(ws), quiet(ws, "none"))


def test_noise_comes_after_demodulation_and_before_bias_and_activation():
    layer, x, w, noise = synthesis().layers[1], torch.randn(2, 6, 4, 4), torch.randn(2, 5), torch.randn(2, 1, 8, 8)
    layer.noise_strength.data.fill_(0.3)
    layer.bias.data.normal_()
    by_hand = F.leaky_relu(layer.conv(x, w) + 0.3 * noise + layer.bias[:, None, None], 0.2) * math.sqrt(2)
    assert torch.allclose(layer(x, w, noise), by_hand, atol=1e-6)


def test_every_style_input_counts_and_gradients_reach_each():
    network = synthesis()
    ws = network.broadcast(torch.randn(2, 5)).requires_grad_()
    base = network(ws, "none")
    gradient = torch.autograd.grad(base.square().sum(), ws)[0]
    assert (gradient.abs().sum(2) > 0).all()
    for i in range(network.num_ws):
        other = ws.detach().clone()
        other[:, i] += 1
        assert not torch.allclose(network(other, "none"), base, atol=1e-4)


def test_an_image_shares_its_style_with_the_next_resolution():
    network, seen = StyleSynthesis(16, 1, w_dim=5, **TINY), {}
    for kind, modules in (("layer", network.layers), ("image", network.images)):
        for i, module in enumerate(modules):
            module.register_forward_pre_hook(lambda _, args, name=(kind, i): seen.update({name: int(args[1][0, 0])}))
    network(torch.arange(6.0)[None, :, None].expand(2, -1, 5))
    assert [seen["layer", i] for i in range(5)] == [0, 1, 2, 3, 4]
    assert [seen["image", i] for i in range(3)] == [1, 3, 5]


def test_modulation_is_chosen_by_size_and_not_by_batch(monkeypatch):
    groups, conv2d = [], torch.nn.functional.conv2d

    def spy(*args, **more):
        groups.append(more.get("groups", 1))
        return conv2d(*args, **more)

    monkeypatch.setattr("torch.nn.functional.conv2d", spy)
    for batch in (2, 5):
        modulated_conv(
            torch.ones(batch, 4, 16, 16), torch.ones(4, 4, 3, 3), torch.ones(batch, 4)
        )  # 2048 activations, 144 weights
        modulated_conv(torch.ones(batch, 4, 4, 4), torch.ones(4, 4, 3, 3), torch.ones(batch, 4))  # 128 activations
    assert groups == [2, 1, 5, 1]


@pytest.mark.long
def test_exported_for_any_batch():
    mapping = NODEMapping((1, 8, 8), 5)

    class Generator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mapping, self.synthesis = mapping, synthesis()

        def forward(self, z):
            return self.synthesis(self.synthesis.broadcast(self.mapping(z)), "const")

    generator = Generator().eval()
    program = torch.export.export(
        generator, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},)
    )
    z = torch.randn(5, 1, 8, 8)
    assert torch.allclose(program.module()(z), generator(z), atol=1e-5)


def test_synthesis_refuses_what_does_not_fit():
    network = synthesis()
    with pytest.raises(UserError, match=r"\[B, 4, 5\]; these are \[2, 3, 5\]"):
        network(torch.randn(2, 3, 5))
    with pytest.raises(UserError, match="noise mode 'constant'.*'const'"):
        network(torch.randn(2, 4, 5), "constant")
    with pytest.raises(UserError, match="3 noise inputs; 1 were given"):
        network(torch.randn(2, 4, 5), noises=[torch.randn(2, 1, 4, 4)])


def test_networks_say_how_they_were_built():
    network = synthesis()
    config = dict(network.config)
    assert config.pop("arch") == "style_synthesis"
    again = type(network)(**config)
    again.load_state_dict(network.state_dict())
    assert again.config == network.config


def double(module):
    module.double()
    return module


@pytest.mark.parametrize("how", ["grouped", "scale"])
@pytest.mark.parametrize("up", [False, True])
def test_modulated_convolution_is_twice_differentiable(how, up):
    torch.manual_seed(0)
    x, weight, styles = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 3, 3), (2, 2, 3, 3), (2, 2))
    )
    assert torch.autograd.gradgradcheck(lambda *a: modulated_conv(*a, up=up, how=how), (x, weight, styles))


def test_synthesis_is_twice_differentiable():
    network = double(synthesis(base=16, max_channels=2))
    ws = network.broadcast(torch.randn(2, 5, dtype=torch.float64)).requires_grad_()
    pick = torch.randn(1, 8, 8, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda ws: (network(ws, "const") * pick).sum((1, 2, 3)), (ws,))


def test_images_start_at_a_sensible_size():
    torch.manual_seed(0)
    network = StyleSynthesis(32, 3, w_dim=64, base=2048, max_channels=64)
    std = network(network.broadcast(torch.randn(8, 64))).std().item()
    assert 0.3 < std < 5 and math.isfinite(std)
