import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2o.errors import UserError
from d2o.features.latent_vgg import LatentVggFeatures
from d2o.interop.weights import WEIGHTS
from d2o.losses.latent_lpips import RELEASED, LatentLPIPS, load_latent_lpips
from d2o.networks.latent_vgg import TunedVGG
from d2o.spaces.load import SPACES

FOLDER = Path(__file__).parents[1] / "golden" / "latent_lpips"


def official_weights() -> dict[str, torch.Tensor]:
    """A state dict with the released files' keys, its values by the rule in tests/golden/README.md."""
    shapes = json.loads((FOLDER / "sd15_keys.json").read_text())
    weights = {}
    for i, name in enumerate(sorted(shapes)):
        r = torch.randn(shapes[name], generator=torch.Generator().manual_seed(1000 + i))
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros(shapes[name], dtype=torch.int64)
        elif name.endswith("running_var"):
            weights[name] = 1 + 0.1 * r.abs()
        elif name.startswith("lin") and r.ndim == 4:
            weights[name] = 0.1 * r.abs()
        elif name.endswith("running_mean") or name.endswith("bias"):
            weights[name] = 0.05 * r
        elif r.ndim == 4:
            weights[name] = r * (2 / (9 * r.shape[1])) ** 0.5
        else:
            weights[name] = 1 + 0.05 * r
    for name in [name for name in weights if name.startswith("lins.")]:
        weights[name] = weights[name.replace("lins.", "lin")].clone()
    return weights


@pytest.fixture(scope="module")
def weights():
    return official_weights()


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "sd15.safetensors")


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sd15_latest_vgg16_tuned.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def distance(file):
    return load_latent_lpips("sd15", file)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_distance_and_its_gradient_are_the_official_ones(distance, golden):
    a = golden["a"].clone().requires_grad_()
    found = distance(a, golden["b"])
    found.sum().backward()
    assert found.shape == golden["distance"].shape
    assert relative(found.detach(), golden["distance"]) < 1e-4
    # A unit of a ReLU or a maximum that float32's rounding puts on the other side changes the gradient by all of its
    # share, and which units these
    # are depends on the kernels: 6e-4 were seen between two of one processor. All other entries agree as the distance
    # does.
    assert relative(a.grad, golden["grad_a"]) < 2e-3
    assert ((a.grad - golden["grad_a"]).abs() / golden["grad_a"].abs().mean()).median() < 3e-5
    with torch.no_grad():
        assert relative(distance(golden["a"], golden["b"], raw=True), golden["distance_unscaled_input"]) < 1e-4


def test_with_the_mean_absolute_difference(distance, golden, monkeypatch):
    monkeypatch.setattr(distance, "l1", 1.0)
    with torch.no_grad():
        assert relative(distance(golden["a"], golden["b"]), golden["distance_plus_l1"]) < 1e-4


def test_frozen_zero_at_equality_and_symmetric(distance, golden):
    assert not any(module.training for module in distance.train().features.modules())
    assert not [*distance.parameters()] and not distance.state_dict()  # nobody trains or saves it
    a, b = golden["a"][:1, :, :8, :8], golden["b"][:1, :, :8, :8]
    assert distance(a, a).item() == 0
    assert distance(a, b).item() == pytest.approx(distance(b, a).item(), rel=1e-6)


def test_raw_latents_are_scaled_as_the_diffusion_model_sees_them():
    torch.manual_seed(0)
    # every space's network has the shape of the released one
    shapes = {name: load_latent_lpips(name, device="meta").features.network.net.channels for name in RELEASED}
    assert shapes == {"sd15": 4, "sd21": 4, "sdxl": 4, "sd3": 16, "flux": 16}
    distance = LatentLPIPS(LatentVggFeatures("flux", TunedVGG(16)), SPACES["flux"], l1=1.0)
    a, b = torch.randn(2, 1, 16, 4, 4)
    assert torch.allclose(distance(a, b, raw=True), distance((a - 0.1159) * 0.3611, (b - 0.1159) * 0.3611))


def test_every_space_has_published_weights():
    assert {f"latent-lpips-{name}" for name in RELEASED} <= set(WEIGHTS)


def test_maps_are_taken_where_the_released_networks_have_them():
    maps = load_latent_lpips("sd15", device="meta").features.maps(torch.zeros(1, 4, 64, 64, device="meta"))
    assert [(f.shape[1], f.shape[2]) for f in maps] == [(64, 64), (128, 64), (256, 64), (512, 32), (512, 16)]


def test_files_that_do_not_fit_are_refused(weights, golden, tmp_path):
    def refused(state, space="sd15"):
        path = tmp_path / "weights.pth"
        torch.save(state, path)
        with pytest.raises(UserError) as error:
            load_latent_lpips(space, path)
        assert str(path) in str(error.value)
        return str(error.value)

    assert "size mismatch" in refused(weights, "flux")
    small = {name: value for name, value in weights.items() if not name.startswith("lins.")}
    assert "lin3" in refused({name: value for name, value in small.items() if not name.startswith("lin3")})
    assert "lins.2" in refused(weights | {"lins.2.model.1.weight": weights["lin2.model.1.weight"] + 1})
    with pytest.raises(UserError, match="did you mean 'sdxl'"):
        load_latent_lpips("sdxi", tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"\[n, 4, h, w\]"):
        load_latent_lpips("sd15", device="meta")(torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 8, 8))
