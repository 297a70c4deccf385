import pytest
import torch

from d2o.errors import UserError
from d2o.evaluation.pair_distances import AT_ONCE, PAIR_DISTANCES, load_pair_distance
from d2o.interop import torchvision_compat
from d2o.losses.latent_lpips import RELEASED, load_latent_lpips
from d2o.networks.latent_vgg import TunedVGG

torchvision_compat.ensure()

import lpips  # noqa: E402 (it imports torchvision)
import torchvision  # noqa: E402

TRUNKS = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setenv("D2O_HOME", str(tmp_path))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """Files of torchvision's layout with random weights; the classifier, which LPIPS does not read, is cut off."""
    folder, files = tmp_path_factory.mktemp("trunks"), {}
    torch.manual_seed(0)
    for name, make in TRUNKS.items():
        with torch.device("meta"):
            shapes = make().features.state_dict()
        files[name] = folder / f"{name}.pth"
        torch.save({f"features.{key}": 0.05 * torch.randn(value.shape) for key, value in shapes.items()}, files[name])
    return files


def images(n, channels, size, seed=0):
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")  # torchvision's, of what lpips gives it
@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_lpips_is_the_packages(trunk, trunks):
    rng = torch.get_rng_state()
    distance = load_pair_distance(f"lpips-{trunk}", trunks[trunk])
    assert torch.equal(torch.get_rng_state(), rng)  # the draws of who asked for it stay what they were
    theirs = lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False)
    weights = torch.load(trunks[trunk], weights_only=True)
    theirs.net.load_state_dict(
        {name: weights["features." + name.partition(".")[2]] for name in theirs.net.state_dict()}
    )
    a, b = images(2, 3, 48), images(2, 3, 48, seed=1)
    with torch.no_grad():
        expected = theirs(a / 127.5 - 1, b / 127.5 - 1).flatten()
    assert expected.min() > 1e-3
    assert torch.allclose(distance(a, b), expected, rtol=1e-5)
    assert distance.better == "lower" and distance.space == "pixel" and len(distance.sha256) == 64


def test_what_a_distance_of_images_is(trunks):
    distance = load_pair_distance("lpips", trunks["alex"])
    assert distance.name == "lpips-alex"
    n = AT_ONCE + 1  # more than one pass
    a, b = images(n, 1, 31), images(n, 1, 31, seed=1)
    found = distance(a, b)
    assert found.shape == (n,) and found.dtype == torch.float32
    assert torch.allclose(
        found[-1:], distance(a[-1:].expand(-1, 3, -1, -1), b[-1:].expand(-1, 3, -1, -1))
    )  # grey is repeated
    assert torch.equal(distance(a, a), torch.zeros(n))
    assert torch.allclose(distance(b, a), found)


def test_images_that_the_network_does_not_take(trunks):
    distance = load_pair_distance("lpips", trunks["alex"])
    with pytest.raises(UserError, match="at least 31x31 pixels; these are 8x8"):
        distance(images(1, 3, 8), images(1, 3, 8))
    with pytest.raises(UserError, match="1 or 3 channels; these have 4"):
        distance(images(1, 4, 32), images(1, 4, 32))
    with pytest.raises(UserError, match="pairs of one shape"):
        distance(images(2, 3, 32), images(1, 3, 32))
    with pytest.raises(TypeError, match="uint8"):
        distance(images(1, 3, 32).float(), images(1, 3, 32))


def test_another_networks_weights_and_none(trunks, tmp_path):
    with pytest.raises(UserError, match="is not torchvision's VGG-16"):
        load_pair_distance("lpips-vgg", trunks["alex"])
    with pytest.raises(UserError, match="alexnet-owt-7be5be79.pth") as error:
        load_pair_distance("lpips")
    assert str(tmp_path / "weights") in str(error.value)
    with pytest.raises(UserError, match="did you mean 'lpips-vgg'"):
        load_pair_distance("lpips-vg")


def test_latent_lpips_of_pairs(tmp_path):
    assert {f"latent-lpips-{space}" for space in RELEASED} <= set(PAIR_DISTANCES)
    torch.manual_seed(0)
    torch.save(TunedVGG(4).state_dict(), tmp_path / "tuned.pth")
    network = load_latent_lpips("sd15", tmp_path / "tuned.pth", l1=1.0)
    distance = load_pair_distance("latent-lpips-sd15", tmp_path / "tuned.pth")
    a, b = torch.randn(2, 3, 4, 8, 8)
    assert distance.space == "latent"
    assert torch.allclose(distance(a, b), network.perceptual(a, b))  # without the L1 term
    with pytest.raises(UserError, match=r"\[n, 4, h, w\]"):
        distance(a[:, :3], b[:, :3])
