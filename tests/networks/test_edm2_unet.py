import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from d2o.diffusion.schedules import EDMSchedule
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.interop.nvidia_pickle import read_nvidia_pickle
from d2o.networks.build import build_network, count_parameters, set_dropout
from d2o.networks.edm2_blocks import MPConv, mp_cat, mp_silu, mp_sum
from d2o.networks.edm2_unet import EDM2_SIZES, EDM2Precond

GOLDEN = Path(__file__).parents[1] / "golden" / "edm"
TINY = {
    "arch": "edm2",
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 16,
    "logvar_channels": 8,
}


def tiny(**more):
    """A network of 60 thousand parameters, with gains that let everything speak."""
    torch.manual_seed(0)
    network = build_network({**TINY, **more})
    for name, p in network.named_parameters():
        if name.endswith("_gain"):
            nn.init.constant_(p, 0.5)
    return network


@pytest.fixture(scope="module")
def golden():
    """An official checkpoint read by the safe reader, and what the official code computed with it."""
    found = read_nvidia_pickle(GOLDEN / "edm2-tiny.pkl")
    network = build_network(found.config())
    assert list(network.state_dict()) == list(found.state_dict)
    network.load_state_dict(found.state_dict)
    return network.eval().requires_grad_(False), load_file(GOLDEN / "edm2-tiny.safetensors")


def test_denoiser_and_uncertainty_agree_with_the_official_ones(golden):
    network, numbers = golden
    for label in (numbers["label"].argmax(1), numbers["label"]):
        denoised, logvar = network(numbers["noisy"], numbers["sigma"], label, return_logvar=True)
        assert (denoised - numbers["denoised"]).abs().max() < 1e-5
        assert logvar.shape == (4, 1, 1, 1) and (logvar - numbers["logvar"]).abs().max() < 1e-6
    assert torch.equal(network(numbers["noisy"], numbers["sigma"], label), denoised)
    assert torch.equal(network.logvar(numbers["sigma"]), logvar)


@pytest.mark.long
def test_sampler_agrees_with_the_official_one(golden):
    network, numbers = golden
    solver, label = Solver("heun", 32), numbers["label"]
    samples = solver.run(
        lambda x, sigma: network(x, sigma, label), numbers["latents"], EDMSchedule(network.sigma_min, network.sigma_max)
    )
    assert solver.nfe == 63 and (samples - numbers["heun32"]).abs().max() < 1e-3


PUBLISHED = {
    "xxs": 31309029,
    "xs": 124713253,
    "s": 280212837,
    "m": 497807781,
    "l": 777498085,
    "xl": 1119283749,
    "xxl": 1523164773,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_networks_have_their_parameter_counts(preset):
    config = {"arch": "edm2", "preset": preset, "img_resolution": 64, "img_channels": 4, "label_dim": 1000}
    with torch.device("meta"):
        network, generator = build_network(config), build_network({**config, "logvar_channels": 0})
        again = build_network(network.config)
    assert (
        count_parameters(network) == count_parameters(again) == PUBLISHED[preset] and len(network.state_dict()) == 203
    )
    assert count_parameters(generator) == PUBLISHED[preset] - 128  # SiD's students have no uncertainty head
    assert (
        network.config["dropout"] == (0.1 if preset in ("m", "l", "xl", "xxl") else 0.0)
        and "preset" not in network.config
    )


def test_published_names_and_shapes():
    with torch.device("meta"):
        network = build_network(
            {"arch": "edm2", "preset": "xs", "img_resolution": 64, "img_channels": 4, "label_dim": 1000}
        )
        unconditional = build_network({"arch": "edm2", "preset": "xs", "img_resolution": 64, "img_channels": 4})
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert shapes["unet.enc.64x64_conv.weight"] == (128, 5, 3, 3) and shapes["unet.emb_label.weight"] == (512, 1000)
    assert shapes["unet.enc.32x32_block0.conv_skip.weight"] == (256, 128, 1, 1) and shapes[
        "unet.dec.8x8_in0.attn_qkv.weight"
    ] == (1536, 512, 1, 1)
    assert (
        shapes["logvar_linear.weight"] == (1, 128)
        and shapes["unet.out_gain"] == shapes["unet.dec.64x64_up.emb_gain"] == ()
    )
    assert set(shapes) - set(unconditional.state_dict()) == {"unet.emb_label.weight"}


def test_magnitudes_are_preserved():
    torch.manual_seed(0)
    a, b = torch.randn(64, 48, 8, 8), torch.randn(64, 16, 8, 8)
    for y in (
        mp_silu(a),
        mp_sum(a, a.flip(0), 0.3),
        mp_cat(a, b, 0.5),
        MPConv(48, 32, 3)(a)[:, :, 1:-1, 1:-1],
        MPConv(48, 32, 0)(a[:, :, 0, 0]),
    ):
        assert abs(y.square().mean().sqrt() - 1) < 0.05
    joined = mp_cat(a, b, 0.5)  # both inputs contribute the same, whatever their numbers of channels
    assert torch.allclose(joined[:, :48].square().sum(1).mean(), joined[:, 48:].square().sum(1).mean(), rtol=0.05)


def test_no_label_is_a_zero_row():
    network, x, sigma = tiny().eval(), torch.randn(2, 2, 8, 8), torch.tensor([0.5, 3.0])
    with torch.inference_mode():
        plain = network(x, sigma)
        assert torch.equal(network(x, sigma, torch.tensor([-1, -1])), plain) and torch.equal(
            network(x, sigma, torch.zeros(2, 3)), plain
        )
        assert not torch.allclose(network(x, sigma, torch.tensor([0, 2])), plain)
        alone = network(x[:1], sigma[:1], torch.tensor([0]))
        assert torch.allclose(network(x, sigma, torch.tensor([0, 2]))[:1], alone, atol=1e-5)


def test_runs_in_half_precision_with_the_uncertainty_in_full(golden):
    network, numbers = golden
    x, sigma, label = numbers["noisy"], numbers["sigma"], numbers["label"]
    full, full_logvar = network(x, sigma, label, return_logvar=True)
    with torch.autocast("cpu", torch.bfloat16):
        half, half_logvar = network(x, sigma, label, return_logvar=True)
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.05
    assert torch.equal(half_logvar, full_logvar)


def step(network, optimizer=None):
    """One training step; the loss takes two forward passes before its backward, as SiD's and SiDA's do."""
    optimizer = optimizer or torch.optim.Adam(network.parameters(), lr=0.01)
    torch.manual_seed(1)
    x, sigma = torch.randn(2, 2, 8, 8), torch.tensor([0.5, 3.0])
    first, logvar = network(x, sigma, return_logvar=True)
    loss = (first - network(x + 0.1, sigma)).square().mean() + (first.square() / logvar.exp() + logvar).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def norms(network):
    return torch.cat([m.weight.flatten(1).square().mean(1).sqrt() for m in network.modules() if isinstance(m, MPConv)])


def test_weights_are_normalised_after_the_step_and_compute_the_same():
    network = tiny().train()
    step(network)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    x, sigma = torch.randn(2, 2, 8, 8), torch.tensor([0.5, 3.0])
    before = network(x, sigma)
    assert norms(network).mean() > 2
    network.normalize_weights()
    assert (norms(network) - 1).abs().max() < 1e-3 and (network(x, sigma) - before).abs().max() < 2e-3
    again = copy.deepcopy(network.state_dict())
    network.normalize_weights()
    assert all(torch.allclose(again[name], value, rtol=1e-3) for name, value in network.state_dict().items())


def test_weights_are_normalised_before_each_forward_in_training_only():
    network = tiny(force_wn="pre_forward")
    step(network.train())
    plain = tiny(force_wn="off")
    step(plain.train())
    assert (norms(plain) - 1).abs().max() > 0.01
    stored = copy.deepcopy(network.state_dict())
    network.eval()(torch.randn(1, 2, 8, 8), torch.tensor(1.0))
    assert all(torch.equal(stored[name], value) for name, value in network.state_dict().items())
    network.train()(torch.randn(1, 2, 8, 8), torch.tensor(1.0))
    assert (norms(network) - 1).abs().max() < 1e-3


def test_without_the_head_there_is_no_uncertainty():
    network = tiny(logvar_channels=0).eval()
    assert not any(name.startswith("logvar") for name in network.state_dict())
    for ask in (
        lambda: network(torch.randn(1, 2, 8, 8), torch.tensor(1.0), return_logvar=True),
        lambda: network.logvar(torch.tensor(1.0)),
    ):
        with pytest.raises(UserError, match="no uncertainty head"):
            ask()


def test_dropout_acts_in_training_only():
    network = tiny()
    set_dropout(network, 0.5)
    assert network.config["dropout"] == 0.5 and build_network(network.config).unet.enc["8x8_block0"].dropout == 0.5
    x, sigma = torch.randn(1, 2, 8, 8), torch.tensor(1.0)
    assert not torch.equal(network.train()(x, sigma), network(x, sigma))
    assert torch.equal(network.eval()(x, sigma), network(x, sigma))


def test_bad_configurations_are_refused():
    with pytest.raises(UserError, match=r"unknown network.preset 'xx'") as caught:
        build_network({"arch": "edm2", "preset": "xx", "img_resolution": 64, "img_channels": 4})
    assert all(size in caught.value.hint for size in EDM2_SIZES)
    with pytest.raises(UserError, match="did you mean 'post_step'"):
        build_network({**TINY, "force_wn": "poststep"})
    with pytest.raises(UserError, match="unknown key for edm2; did you mean 'logvar_channels'"):
        build_network({**TINY, "logvar_channel": 8})
    with pytest.raises(UserError, match="unknown network architecture 'edm3': did you mean 'edm2'"):
        build_network({**TINY, "arch": "edm3"})
    with pytest.raises(UserError, match="network.model_channels: expected an integer, got 'many'"):
        build_network({**TINY, "model_channels": "many"})
    assert isinstance(build_network(TINY), EDM2Precond)
