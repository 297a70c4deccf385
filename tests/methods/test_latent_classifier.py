"""Stage one of LatentLPIPS: VGG-16 classifies latents or pixels."""

from __future__ import annotations

import pytest
import torch

from d2o.augment.crop import centre_crops, random_crops
from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file
from d2o.methods.base import Setup
from d2o.methods.latent_classifier import LatentClassifierMethod, LatentClassifierOptions
from d2o.networks.build import build_network, count_parameters
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag
from d2o.training.loop import Trainer

NARROW = {"width": 2, "hidden": 8, "side": 2, "dropout": 0.0}
OWN = {"space": "tiny-sd", "image_size": 32, "crop_scale": [0.6, 1.0], "flip": False, "pool": 4}


@pytest.mark.parametrize(
    ("pixels", "batch_norm", "parameters"),  # of torchvision's vgg16 and vgg16_bn for pixels; the sheet's for latents
    [(True, False, 138_357_544), (True, True, 138_365_992), (False, True, 138_366_568)],
)
def test_parameters_of_vgg(pixels, batch_norm, parameters):
    config = {"channels": 3 if pixels else 4, "classes": 1000, "pixels": pixels, "batch_norm": batch_norm}
    with torch.device("meta"):
        network = build_network({"arch": "latent_classifier", **config})
        side = 224 if pixels else 28
        assert network.trunk(torch.zeros(1, config["channels"], side, side))[-1].shape == (1, 512, 7, 7)
    assert count_parameters(network) == parameters


def setup_of(recipe, **data) -> Setup:
    images = open_images("real:digits", **{"resolution": 32, "channels": 3, "limit": 24, **data})
    return Setup(recipe.options, network=recipe.network, images=images, batch=recipe.batch, seed=recipe.seed)


def recipe_of(own=None, network=None, **rest) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "t",
            "method": "latent-classifier",
            "network": {"arch": "latent_classifier", **NARROW, **(network or {})},
            "latent_classifier": {**OWN, **(own or {})},
            "optim": {"name": "sgd", "lr": 0.05, "betas": [0.9, 0.999]},
            "batch": 8,
            "images": 24,
            "threads": 1,
            **rest,
        }
    )


def train(folder, recipe, **data):
    folder.mkdir()
    Trainer(recipe, setup_of(recipe, **data), folder).run(lambda *_: None, StopFlag())
    return load_file(folder / "checkpoints" / "last.safetensors")


def test_micro_batches_change_neither_weights_nor_running_statistics(tmp_path):
    whole, meta = train(tmp_path / "a", recipe_of())
    parts, _ = train(tmp_path / "b", recipe_of(micro_batch=4))
    assert meta["kind"] == "latent_classifier" and meta["space"]["name"] == "tiny-sd" and meta["space"]["sha256"]
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5)
    assert whole["trunk.slice1.1.running_mean"].abs().sum() > 0  # they have moved
    assert not torch.equal(whole["trunk.slice1.1.running_var"], torch.ones(2))
    assert whole["trunk.slice1.1.num_batches_tracked"] == 3  # moves, not pools


def test_pools_of_batch_normalisation_are_those_of_torch():
    torch.manual_seed(0)
    recipe = recipe_of({"pool": 8}, images=8)
    network = LatentClassifierMethod(setup_of(recipe)).network
    from d2o.networks.vgg_classifier import RunningStatistics

    x, first = torch.randn(8, 4, 4, 4), network.trunk.slice1
    expected = torch.nn.BatchNorm2d(2)
    expected(first[0](x))
    network.statistics = RunningStatistics(network, 8)
    network(x)
    network.statistics.finish(lambda mean: mean)
    torch.testing.assert_close(first[1].running_mean, expected.running_mean)
    torch.testing.assert_close(first[1].running_var, expected.running_var)


@pytest.mark.parametrize("own", [{"space": "pixels"}, {"encode": "mean", "validate_encode": "sample"}])
def test_spaces_and_ways_to_encode(tmp_path, own):
    recipe = recipe_of(
        {**own, "holdout": 0.25, "decay_every": 16}, {"batch_norm": False}, eval={"every": 24, "metric": "accuracy"}
    )
    tensors, meta = train(tmp_path / "a", recipe)
    assert 0 <= meta["metrics"]["accuracy"] <= 1 and not any("running" in name for name in tensors)


@pytest.mark.long
def test_what_is_validated():
    recipe = recipe_of({"holdout": 0.25})
    method = LatentClassifierMethod(setup_of(recipe))
    held = set(method.held_indices.tolist())
    assert len(held) == 6 and not held & set(method.train_indices.tolist())
    always = torch.nn.Module()
    always.weight = torch.nn.Parameter(torch.zeros(1))
    always.forward = lambda x: torch.eye(10)[torch.full((len(x),), 3)]
    labels = method.images.labels[method.held_indices]
    assert method.validate(always)["accuracy"] == pytest.approx((labels == 3).float().mean().item())
    other = LatentClassifierMethod(setup_of(recipe_of({"validation": "real:digits/b"})))
    share = (other.validation.labels == 3).float().mean().item()
    assert other.validate(always)["accuracy"] == pytest.approx(share)


def test_the_rate_falls_in_steps():
    method = LatentClassifierMethod(setup_of(recipe_of({"decay_every": 16, "decay_factor": 0.1})))
    assert [method.rate(i) for i in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("own", "data", "message"),
    [
        ({"image_size": 40}, {}, "larger than the images"),
        ({"crop_scale": [0.5, 0.2]}, {}, "crop_scale"),
        ({}, {"channels": 1}, "grey"),
        ({"space": "tiny-sdd"}, {}, "did you mean 'tiny-sd'"),
    ],
)
def test_mistakes_are_told(own, data, message):
    with pytest.raises(UserError, match=message):
        LatentClassifierMethod(setup_of(recipe_of(own), **data))


def test_crops():
    x = torch.rand(2, 3, 8, 8)
    whole = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.9], [0.5, 0.5, 0.5, 0.5, 0.1]])
    found = random_crops(x, whole, 8, (1.0, 1.0), flip=True)
    torch.testing.assert_close(found[0], x[0])
    torch.testing.assert_close(found[1], x[1].flip(2))
    torch.testing.assert_close(random_crops(x, whole, 8, (1.0, 1.0), flip=False), x)
    corner = torch.tensor([[0.0, 0.5, 0.0, 1.0, 0.9]]).expand(2, -1)  # a quarter of the area: at the left, below
    torch.testing.assert_close(random_crops(x, corner, 4, (0.25, 1.0), flip=True), x[:, :, 4:, :4])
    assert torch.equal(centre_crops(x, 4), x[:, :, 2:6, 2:6])


def test_options_have_defaults_of_the_paper():
    options = LatentClassifierOptions(space="sd15")
    assert (options.image_size, options.encode, options.validate_encode) == (224, "sample", "mean")
