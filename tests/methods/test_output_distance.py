"""The distance that a recipe names: whose LatentLPIPS, and what is looked at once for several comparisons."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from d2o.errors import UserError
from d2o.interop.safetensors_io import save_file
from d2o.losses.latent_lpips import RELEASED, LatentLPIPS, load_latent_lpips
from d2o.losses.perceptual import Target
from d2o.methods.base import Draws
from d2o.methods.output_distance import DistanceOptions, OutputDistance
from d2o.networks.latent_vgg import TunedVGG
from d2o.spaces.load import load_space
from d2o.students.base import checkpoint_meta
from d2o.teachers.base import Spec

CPU, META = torch.device("cpu"), torch.device("meta")


def folder(channels: int = 4) -> SimpleNamespace:
    """A Stable Diffusion of a folder, as far as a distance looks at it: its space is called as the folder."""
    return SimpleNamespace(spec=Spec("mine", (channels, 8, 8), "/models/sd15", "text"), space=load_space("tiny-sd"))


def distance(teacher=None, device=CPU, **options) -> OutputDistance:
    given = DistanceOptions.model_validate({"kind": "latent_lpips", **options})
    return OutputDistance(given, teacher or folder(), device, "diffusion2gan.distance")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A small LatentLPIPS of sd15's latents."""
    torch.manual_seed(0)
    network = TunedVGG(4, width=4)
    for head in network.weights:
        head.detach().abs_()
    path = tmp_path_factory.mktemp("own") / "own.safetensors"
    save_file(path, network.state_dict(), checkpoint_meta("latent_lpips", network.config, None, space={"name": "sd15"}))
    return path


def pair(n: int = 3):
    return torch.randn(2, n, 4, 8, 8, generator=torch.Generator().manual_seed(1)).unbind(0)


@pytest.mark.parametrize("kind", ["latent_lpips", "e_latent_lpips"])
def test_a_teacher_of_a_folder_says_whose_latents_it_makes(own, kind):
    x, y = pair()
    found = distance(kind=kind, space="sd15", weights=str(own), augment="none")
    assert torch.equal(found(x, y, found.draw(Draws(0, 0, 3, 3, CPU))), load_latent_lpips("sd15", own)(x, y))
    with pytest.raises(UserError) as error:  # which was all that could be had: no key led out of it
        distance(kind=kind)
    assert "'/models/sd15'" in error.value.message and "distance.space: sd15" in error.value.hint
    with pytest.raises(UserError, match=r"(?s)compares latents of sd15, not of /models/sd15.*distance.space: sd15"):
        distance(kind=kind, weights=str(own))


def test_all_released_networks_can_be_named():
    channels = {"sd15": 4, "sd21": 4, "sdxl": 4, "sd3": 16, "flux": 16}
    assert tuple(channels) == tuple(sorted(RELEASED, key=[*channels].index)) and len(channels) == len(RELEASED)
    for space, count in channels.items():
        found = distance(folder(count), META, space=space).network
        assert isinstance(found, LatentLPIPS) and found.space.channels == count
        with pytest.raises(UserError, match=rf"distance.space: latents of {space} have {count} channels, and .* makes"):
            distance(folder(20 - count), META, space=space)
    assert distance(space="tiny-sd").network is not None
    with pytest.raises(ValueError, match="space"):
        DistanceOptions.model_validate({"space": "sd16"})


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "mse"},
        {"kind": "pseudo_huber"},
        {"l1": 0.5},
        {"kind": "e_latent_lpips", "augment": "bgco", "vanilla": "sum", "l1": 0.5},
        {"kind": "perceptual", "extractor": "lite0", "size": 32},
    ],
)
def test_a_target_is_the_same_and_looked_at_once(options):
    """Bit for bit, with the gradient."""
    teacher, (a, y) = folder(), pair()
    looked = []
    found = distance(teacher, space="tiny-sd", **options)
    if found.network is not None:
        features = next(m for m in found.network.modules() if hasattr(m, "taps"))
        maps = features.maps
        features.maps = lambda x: looked.append(len(x)) or maps(x)
    draws = found.draw(Draws(0, 0, 3, 3, CPU))
    results = []
    target = found.target(y)
    assert isinstance(target, Target) == (found.network is not None)
    for other in (y, target, target):
        x = a.clone().requires_grad_()
        value = found(x, other, draws)
        value.sum().backward()
        results.append((value.detach(), x.grad, len(looked)))
    for value, gradient, _ in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])
    if options.get("kind") in (None, "perceptual"):
        assert [count for *_, count in results] == [2, 4, 5]  # both; both once more; x alone
