"""DD-GAN's generator: published sizes, what its output depends on, and that small images work."""

import pytest
import torch

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


def test_at_first_the_generator_is_grey():
    torch.manual_seed(0)
    x, t = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert DDGANGenerator(8, 1, **SMALL)(x, t, torch.randn(4, 8)).abs().max() < 0.01


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


def test_classes_are_ours_and_can_be_left_out():
    network = generator(classes=3)
    x, t, z = torch.randn(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), torch.randn(3, 8)
    assert not torch.allclose(
        network(x, t, z, torch.tensor([0, 1, 2])), network(x, t, z, torch.tensor([2, 0, 1])), atol=1e-5
    )
    none = network(x, t, z, torch.full((3,), -1))
    plain = generator()
    plain.load_state_dict({name: value for name, value in network.state_dict().items() if not name.startswith("label")})
    assert torch.allclose(none, plain(x, t, z), atol=1e-6)


def test_it_is_rebuilt_from_its_configuration():
    x, t, z = torch.randn(4, 1, 8, 8), torch.arange(4), torch.randn(4, 8)
    network = generator()
    again = build_network(network.config)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, t, z), network(x, t, z))


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
