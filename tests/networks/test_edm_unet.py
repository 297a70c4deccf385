from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2o.errors import UserError
from d2o.networks.build import build_network, count_parameters
from d2o.networks.edm_unet import EDMPrecond
from d2o.teachers.registry import load_teacher
from tests.helpers import tiny_network

GOLDEN = Path(__file__).parents[1] / "golden" / "edm"


@pytest.fixture(scope="module", params=["edm-ddpmpp", "edm-adm"])
def golden(request):
    """An official checkpoint read by the safe reader, and what the official code computed with it."""
    return load_teacher(GOLDEN / f"{request.param}.pkl"), load_file(GOLDEN / f"{request.param}.safetensors")


def test_denoiser_agrees_with_the_official_one(golden):
    teacher, numbers = golden
    for condition in (
        numbers["label"].argmax(1),
        numbers["label"],
    ):  # class indices as d2o has them, one-hot rows as EDM has them
        with torch.inference_mode():
            denoised = teacher.network(numbers["noisy"], numbers["sigma"], condition)
        assert (denoised - numbers["denoised"]).abs().max() < 1e-4
    assert torch.equal(teacher.denoise(numbers["noisy"], numbers["sigma"], numbers["label"].argmax(1)), denoised)


@pytest.mark.long
@pytest.mark.parametrize(("name", "solver", "steps"), [("heun18", "heun", 18), ("euler10", "euler", 10)])
def test_sampler_agrees_with_the_official_one(golden, name, solver, steps):
    teacher, numbers = golden
    samples = teacher.sample(numbers["latents"], numbers["label"].argmax(1), solver=solver, steps=steps)
    assert samples.dtype == torch.float32 and (samples - numbers[name]).abs().max() < 1e-3


def test_a_sample_does_not_depend_on_its_batch(golden):
    teacher, numbers = golden
    with torch.inference_mode():
        alone = teacher.network(numbers["noisy"][2:3], numbers["sigma"][2:3], numbers["label"][2:3])
    assert torch.allclose(alone, numbers["denoised"][2:3], atol=1e-4)


CIFAR10 = {"img_resolution": 32, "img_channels": 3, "augment_dim": 9, "channel_mult": [2, 2, 2], "dropout": 0.13}
FFHQ = {"img_resolution": 64, "img_channels": 3, "augment_dim": 9, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}
PUBLISHED = {  # name: (configuration, parameters, state-dict keys)
    "cifar10-uncond-vp": ({"arch": "ddpmpp", **CIFAR10}, 55733891, 425),
    "cifar10-cond-vp": ({"arch": "ddpmpp", "label_dim": 10, **CIFAR10}, 55735299, 427),
    "cifar10-uncond-ve": ({"arch": "ncsnpp", **CIFAR10}, 56397827, 432),
    "cifar10-cond-ve": ({"arch": "ncsnpp", "label_dim": 10, **CIFAR10}, 56400643, 434),
    "ffhq-vp": ({"arch": "ddpmpp", **FFHQ}, 61805571, 553),
    "ffhq-ve": ({"arch": "ncsnpp", **FFHQ}, 62761091, 563),
    "imagenet64-adm": ({"arch": "adm", "img_resolution": 64, "img_channels": 3, "label_dim": 1000}, 295899267, 553),
    "cifar10-uncond-vp without augmentation": ({"arch": "ddpmpp", **CIFAR10, "augment_dim": 0}, 55732739, 424),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_parameter_counts(name):
    config, parameters, keys = PUBLISHED[name]
    with torch.device("meta"):
        network = build_network(config)
    assert count_parameters(network) == parameters
    assert len(network.state_dict()) == keys


def test_published_names_and_shapes():
    with torch.device("meta"):
        cifar10 = build_network(PUBLISHED["cifar10-cond-ve"][0]).state_dict()
        imagenet = build_network(PUBLISHED["imagenet64-adm"][0]).state_dict()
    shapes = {name: tuple(t.shape) for name, t in cifar10.items()}
    assert shapes["model.enc.32x32_block0.conv0.weight"] == (256, 128, 3, 3)
    assert shapes["model.enc.16x16_down.conv0.resample_filter"] == (1, 1, 4, 4)
    assert shapes["model.enc.16x16_aux_residual.weight"] == (256, 3, 3, 3)
    assert shapes["model.enc.16x16_block0.qkv.weight"] == (768, 256, 1, 1)
    assert shapes["model.dec.8x8_block0.skip.weight"] == (256, 512, 1, 1)
    assert {"model.map_noise.freqs", "model.dec.8x8_in0.proj.bias", "model.dec.32x32_aux_conv.weight"} <= set(shapes)
    shapes = {name: tuple(t.shape) for name, t in imagenet.items()}
    assert shapes["model.enc.32x32_block0.affine.weight"] == (768, 768) and shapes["model.map_label.weight"] == (
        768,
        1000,
    )
    assert "model.map_label.bias" not in shapes and "model.enc.32x32_down.skip.weight" not in shapes
    assert "model.enc.32x32_down.skip.resample_filter" in shapes


def test_no_label_is_a_zero_row_and_no_augmentation_is_zeros():
    network = tiny_network(augment_dim=9).eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    with torch.inference_mode():
        plain = network(x, sigma)
        assert torch.equal(network(x, sigma, torch.tensor([-1, -1])), plain)
        assert torch.equal(network(x, sigma, torch.zeros(2, 10)), plain)
        assert torch.equal(network(x, sigma, None, torch.zeros(2, 9)), plain)
        assert not torch.allclose(network(x, sigma, torch.tensor([3, 4])), plain)
        assert not torch.allclose(network(x, sigma, None, torch.ones(2, 9)), plain)


def test_preconditioning_limits():
    network = tiny_network().eval()
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(network(x, torch.tensor(1e-5)), x, atol=1e-3)  # no noise: the image itself
        assert network(80 * x, torch.tensor(80.0)).std() < 2  # all noise: the size of data, not of noise
        assert network(x.double(), torch.tensor([1.0], dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_a_network_is_rebuilt_from_its_configuration(arch):
    torch.manual_seed(0)
    network = EDMPrecond(
        arch, 8, 1, 3, model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=()
    ).eval()
    again = build_network(network.config).eval()
    again.load_state_dict(network.state_dict())
    x, sigma, label = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 10.0]), torch.tensor([0, 2])
    with torch.inference_mode():
        assert torch.equal(network(x, sigma, label), again(x, sigma, label))


def test_bad_configurations_are_refused():
    with pytest.raises(UserError, match="unknown network architecture 'ddpmp': did you mean 'ddpmpp'"):
        build_network({"arch": "ddpmp"})
    with pytest.raises(UserError, match="did you mean 'num_blocks'"):
        build_network({"arch": "adm", "img_resolution": 8, "img_channels": 1, "num_block": 2})
    with pytest.raises(UserError, match="cannot build"):
        build_network({"arch": "ddpmpp", "img_resolution": 8})


def test_frequencies_of_the_noise_embedding():
    """Improved consistency training has them 800 times lower (Song & Dhariwal 2024); others are as they were."""
    config = {"arch": "ncsnpp", "img_resolution": 8, "img_channels": 1, "model_channels": 32, "channel_mult": [1]}
    torch.manual_seed(0)
    usual = build_network(config)
    torch.manual_seed(0)
    lower = build_network({**config, "fourier_scale": 0.02})
    assert torch.allclose(lower.model.map_noise.freqs, usual.model.map_noise.freqs * 0.02 / 16)
    assert "fourier_scale" not in usual.config and lower.config["fourier_scale"] == 0.02
    with pytest.raises(UserError, match="network.fourier_scale: expected a number"):
        build_network({**config, "fourier_scale": "low"})
