"""DD-GAN's networks: published sizes, what their outputs depend on, and that small images work."""

import pytest
import torch

from d2o.critics.build import build_critic
from d2o.critics.dd_gan import DDGANCritic, critic_widths
from d2o.errors import UserError
from d2o.networks.build import build_network, count_parameters
from d2o.networks.ncsnpp_blocks import AdaptiveGroupNorm, TimeEmbedding
from d2o.networks.ncsnpp_z import DDGANGenerator

SMALL = {
    "nf": 16,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "nz": 8,
    "zdim": 16,
    "n_mlp": 1,
}


def perturbed(network: torch.nn.Module) -> torch.nn.Module:
    """The last convolutions start at almost 0: give the untrained network something to say."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 4 and p.abs().max() < 1e-3:
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return network


def generator(**more) -> DDGANGenerator:
    torch.manual_seed(0)
    return perturbed(DDGANGenerator(8, 1, **{**SMALL, **more}))


def critic(resolution: int = 8, **more) -> DDGANCritic:
    torch.manual_seed(0)
    return perturbed(DDGANCritic(resolution, 1, **{"width": 8, "temb": 16, **more}))


def test_published_sizes():
    with torch.device("meta"):
        cifar, large = DDGANGenerator(32, 3), DDGANGenerator(256, 3, 64, (1, 1, 2, 2, 4, 4), n_mlp=3)
        assert (count_parameters(cifar), count_parameters(large)) == (48_432_515, 39_726_979)
        assert [name for name in cifar.enc if "attention" in name] == ["16_attention0", "16_attention1"]
        assert [name for name in cifar.dec if "attention" in name] == ["in_attention", "16_attention"]
        assert [name for name in large.enc if "attention" in name] == ["16_attention0", "16_attention1"]
        assert [block.conv0.out_channels for name, block in large.enc.items() if "block1" in name] == [
            64,
            64,
            128,
            128,
            256,
            256,
        ]
        x, t = torch.empty(2, 3, 256, 256), torch.zeros(2, dtype=torch.int64)
        assert large(x, t, torch.empty(2, 100)).shape == x.shape
        small, big = DDGANCritic(32, 3), DDGANCritic(256, 3)
        assert (count_parameters(small), count_parameters(big)) == (12_741_633, 27_737_217)
        assert big(x, t, x).shape == (2,)


def test_the_critic_s_rule_gives_the_published_ones():
    assert critic_widths(32, "small", 64) == [(128, False), (256, True), (512, True), (512, True)]
    assert critic_widths(256, "large", 64) == [(256, True), *[(512, True)] * 5]
    assert critic_widths(8, "small", 64) == [(128, False), (256, True)]
    assert critic_widths(28, "small", 1) == [(2, False), (4, True), (8, True)]  # 7 pixels cannot be halved
    assert [len(critic(size).blocks) for size in (4, 8, 64, 128)] == [1, 2, 5, 5]


def test_the_generator_answers_to_everything_it_is_told():
    network, (x, other) = generator(), torch.randn(2, 3, 1, 8, 8)
    t, z = torch.tensor([0, 1, 3]), torch.randn(3, 8)
    y = network(x, t, z)
    assert y.shape == x.shape and y.abs().max() <= 1
    for changed in (network(other, t, z), network(x, t.flip(0), z), network(x, t, torch.randn(3, 8))):
        assert not torch.allclose(changed, y, atol=1e-4)
    assert torch.allclose(network(x, t, 3 * z), y, atol=1e-5)  # z counts by its direction
    assert torch.allclose(network(x[1:2], t[1:2], z[1:2])[0], y[1], atol=1e-6)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in network.parameters())


def test_at_first_the_generator_is_grey_and_the_critic_undecided():
    torch.manual_seed(0)
    x, t = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert DDGANGenerator(8, 1, **SMALL)(x, t, torch.randn(4, 8)).abs().max() < 0.01
    assert DDGANCritic(8, 1, width=8)(x, t, x).abs().max() < 0.01


def test_adaptive_norm_starts_as_the_plain_one_and_is_moved_by_z():
    norm, x = AdaptiveGroupNorm(16, 6), 3 + 2 * torch.randn(2, 16, 5, 5)
    plain = torch.nn.functional.group_norm(x, 4, eps=1e-6)
    assert torch.allclose(norm(x, torch.zeros(2, 6)), plain, atol=1e-6)
    scale, shift = norm.style(z := torch.randn(2, 6))[:, :, None, None].chunk(2, 1)
    assert torch.allclose(norm(x, z), scale * plain + shift, atol=1e-5)


def test_time_is_embedded_by_sines_then_cosines_of_the_bare_step():
    embedded = TimeEmbedding(8)(torch.tensor([0, 3]))
    frequencies = 10000.0 ** (-torch.arange(4) / 3)
    assert torch.allclose(
        embedded, torch.stack([torch.cat([(s * frequencies).sin(), (s * frequencies).cos()]) for s in (0, 3)])
    )


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


def test_classes_are_ours_and_can_be_left_out():
    network, judge = generator(classes=3), critic(classes=3)
    x, t, z = torch.randn(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), torch.randn(3, 8)
    assert not torch.allclose(
        network(x, t, z, torch.tensor([0, 1, 2])), network(x, t, z, torch.tensor([2, 0, 1])), atol=1e-5
    )
    assert not torch.allclose(
        judge(x, t, x, torch.tensor([0, 1, 2])), judge(x, t, x, torch.tensor([2, 0, 1])), atol=1e-6
    )
    none = network(x, t, z, torch.full((3,), -1))
    plain = generator()
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if not name.startswith("label")})
    assert torch.allclose(none, plain(x, t, z), atol=1e-6)


def test_networks_are_rebuilt_from_their_configuration():
    x, t, z = torch.randn(4, 1, 8, 8), torch.arange(4), torch.randn(4, 8)
    for network, inputs, build in ((generator(), (x, t, z), build_network), (critic(), (x, t, x), build_critic)):
        again = build(network.config)
        again.load_state_dict(network.state_dict())
        assert torch.equal(again(*inputs), network(*inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_resolution": 9}, "cannot be halved 1 times"),
        ({"nf": 18}, "multiple of 4"),
        ({"nf": 36, "channel_mult": [1, 4]}, "do not divide into 32 groups"),
        ({"nfs": 3}, "did you mean 'nf'"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        build_network({"arch": "ddgan", "img_resolution": 8, "img_channels": 1, **SMALL, **change})
    with pytest.raises(UserError, match="kind must be"):
        build_critic({"arch": "ddgan_critic", "img_resolution": 8, "img_channels": 1, "kind": "huge"})
