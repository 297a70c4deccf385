import math

import pytest
import torch

from d2o.diffusion.schedules import EDMSchedule
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.networks.build import build_network, count_parameters

TINY = {
    "arch": "ddpmpp",
    "img_resolution": 8,
    "img_channels": 1,
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}
CIFAR10 = {"arch": "ddpmpp", "img_resolution": 32, "img_channels": 3, "channel_mult": [2, 2, 2], "dropout": 0.13}


class Stub(torch.nn.Module):
    """A raw network that answers 0.5 x + 0.01 c_noise, and remembers what it was asked."""

    def __init__(self, outputs=1):
        super().__init__()
        self.outputs = outputs

    def forward(self, x, c_noise, labels, augment):
        self.x, self.c_noise = x, c_noise
        return torch.cat(
            [0.5 * x + 0.01 * c_noise[:, None, None, None], *[torch.full_like(x, 1e9)] * (self.outputs - 1)], dim=1
        )


def stubbed(precond, **more):
    network = build_network({**TINY, "precond": precond, **more})
    network.model = Stub(2 if precond == "iddpm" else 1)
    return network


def table(precond, s, d=0.5):
    """c_skip, c_out, c_in, c_noise of Karras et al. 2022, Table 1 (consistency: Song et al. 2023) for one noise level,
    in plain numbers."""
    match precond:
        case "edm":
            return d**2 / (s**2 + d**2), s * d / math.hypot(s, d), 1 / math.hypot(s, d), math.log(s) / 4
        case "vp":
            t = (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + s**2)) - 0.1) / 19.9
            return 1, -s, 1 / math.sqrt(s**2 + 1), 999 * t
        case "ve":
            return 1, s, 1, math.log(s / 2)
        case "iddpm":
            u = levels()
            return 1, -s, 1 / math.sqrt(s**2 + 1), 999 - min(range(1001), key=lambda j: abs(u[j] - s))
        case "consistency":
            return (
                d**2 / ((s - 0.002) ** 2 + d**2),
                d * (s - 0.002) / math.hypot(s, d),
                1 / math.hypot(s, d),
                math.log(s) / 4,
            )


def levels():
    u = [0.0] * 1001
    bar = [math.sin(math.pi * j / (2 * 1000 * 1.008)) ** 2 for j in range(1001)]
    for j in range(1000, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], 0.001) - 1)
    return u


@pytest.mark.parametrize("precond", ["edm", "vp", "ve", "iddpm", "consistency"])
def test_denoiser_is_the_table(precond):
    network = stubbed(precond)
    torch.manual_seed(0)
    sigma = torch.tensor([0.02, 0.5, 2.5, 80.0])
    x = torch.randn(4, 1, 8, 8) * sigma.reshape(-1, 1, 1, 1)
    denoised = network(x.double(), sigma.double())
    assert denoised.shape == x.shape and denoised.dtype == torch.float32
    for i, s in enumerate(sigma.tolist()):
        c_skip, c_out, c_in, c_noise = table(precond, s)
        assert network.model.c_noise[i].item() == pytest.approx(c_noise, rel=1e-4, abs=1e-4)
        assert torch.allclose(network.model.x[i], c_in * x[i], rtol=1e-5)
        expected = c_skip * x[i] + c_out * (0.5 * c_in * x[i] + 0.01 * c_noise)
        assert torch.allclose(denoised[i], expected, rtol=1e-4, atol=1e-4), s
    assert torch.allclose(network(x, torch.tensor(2.5))[2], denoised[2])  # one noise level for all


def test_noise_levels_that_the_networks_are_made_for():
    ranges = {
        name: (network.sigma_min, network.sigma_max)
        for name in ("edm", "vp", "ve", "iddpm")
        for network in [stubbed(name)]
    }
    assert ranges["edm"] == (0, math.inf) and ranges["ve"] == (0.02, 100)
    assert ranges["vp"] == pytest.approx(
        (1.0005e-3, 152.167), rel=1e-4
    )  # in float32, as the official code has it, the first is 9.77e-4
    t = torch.tensor(1e-5)
    assert math.sqrt(torch.exp(9.95 * t**2 + 0.1 * t) - 1) == pytest.approx(9.77e-4, rel=1e-3)
    assert ranges["iddpm"] == pytest.approx((0.00642, 20291.17), rel=2e-3)
    narrow = stubbed("ve", sigma_min=0.05, sigma_max=50.0)
    assert (narrow.sigma_min, narrow.sigma_max) == (0.05, 50.0) and build_network(narrow.config).sigma_max == 50.0


def test_iddpm_rounds_to_its_levels():
    network = stubbed("iddpm")
    assert (
        network.u.shape == (1001,) and network.u[0].item() == pytest.approx(20291.17, abs=0.5) and network.u[1000] == 0
    )
    assert network.u[999].item() == pytest.approx(0.00642, abs=1e-5)
    sigma = torch.tensor([[0.0, 0.0065], [1.0, 80.0]], dtype=torch.float64)
    rounded = network.round_sigma(sigma)
    assert rounded.shape == (2, 2) and rounded.dtype == torch.float64
    u = network.u.double()
    for s, r in zip(sigma.flatten(), rounded.flatten(), strict=True):
        assert r in u and (r - s).abs() == (u - s).abs().min()
    assert torch.equal(network.round_sigma(rounded), rounded) and float(network.round_sigma(80.0)) == rounded[1, 1]
    assert torch.equal(stubbed("vp").round_sigma(sigma), sigma)


def test_iddpm_uses_the_mean_and_keeps_its_levels_with_the_weights():
    torch.manual_seed(0)
    network = build_network({**TINY, "arch": "adm", "precond": "iddpm"}).eval()
    assert next(iter(network.state_dict())) == "u" and network.model.out_conv.out_channels == 2
    with torch.no_grad():
        network.model.out_conv.weight.normal_()
        x = torch.randn(2, 1, 8, 8)
        before = network(x, torch.tensor(1.0))
        network.model.out_conv.weight[1] += 1  # the variance
        assert torch.equal(network(x, torch.tensor(1.0)), before)
    with torch.device("meta"):
        again = build_network(network.config)
    again.load_state_dict(network.state_dict(), assign=True)
    assert torch.equal(again.eval()(x, torch.tensor(1.0)), network(x, torch.tensor(1.0)))


@pytest.mark.parametrize("precond", ["vp", "ve", "iddpm"])
def test_samplers_keep_to_the_networks_levels(precond):
    """A perfect denoiser of one image in this preconditioning: the sampler must arrive at the image."""
    network, image = stubbed(precond), torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    asked = []

    def perfect(x, sigma):
        asked.append(float(sigma[0]))
        network.model = lambda c_in_x, c_noise, labels, augment: (
            (image - x) / network.coefficients(sigma.reshape(-1, 1, 1, 1))[1]
        )
        return network(x, sigma)

    del network.model
    schedule = EDMSchedule(network.sigma_min, network.sigma_max, network.round_sigma)
    found = Solver("heun", 10).run(perfect, torch.randn(1, 1, 8, 8), schedule)
    assert (found - image).abs().max() < 1e-3
    assert min(asked) >= max(0.002, network.sigma_min) * 0.999 and max(asked) < 81
    if precond == "iddpm":
        assert set(asked) <= set(network.u.tolist())


def test_the_published_baseline_network_of_vp_has_its_parameter_count():
    with torch.device("meta"):
        network = build_network({**CIFAR10, "precond": "vp"})
    assert count_parameters(network) == 55732739 and network.config["precond"] == "vp"


def test_bad_configurations_are_refused():
    with pytest.raises(UserError, match="unknown preconditioning 'iddpn': did you mean 'iddpm'"):
        build_network({**TINY, "precond": "iddpn"})
    with pytest.raises(UserError, match="no range of noise levels"):
        build_network({**TINY, "sigma_min": 2.0, "sigma_max": 1.0})
    with pytest.raises(UserError, match="unknown key for ddpmpp; did you mean 'precond'"):
        build_network({**TINY, "preconditioning": "vp"})
