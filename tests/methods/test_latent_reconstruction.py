"""Latents that are moved by Adam until a distance to those of images is small."""

from __future__ import annotations

import pytest
import torch

from d2o.condition import Condition
from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file
from d2o.losses.latent_lpips import load_latent_lpips
from d2o.methods.base import Setup
from d2o.methods.latent_reconstruction import LatentReconstruction
from d2o.networks.load import load_weights
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag
from d2o.spaces.load import load_space
from d2o.training.loop import Trainer


def recipe_of(distance=None, own=None, **rest) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "t",
            "method": "latent-reconstruction",
            "latent_reconstruction": {"space": "tiny-sd", "distance": distance or {"kind": "mse"}, **(own or {})},
            "optim": {"lr": 0.05},
            "batch": 2,
            "images": 60,
            "threads": 1,
            **rest,
        }
    )


def setup_of(recipe, **data) -> Setup:
    images = open_images("real:digits", **{"resolution": 32, "channels": 3, "limit": 2, **data})
    return Setup(recipe.options, images=images, batch=recipe.batch, seed=recipe.seed)


def train(folder, recipe):
    folder.mkdir()
    trainer = Trainer(recipe, setup_of(recipe), folder)
    trainer.run(lambda *_: None, StopFlag())
    return trainer


def test_it_goes_from_noise_to_the_images_latents(tmp_path):
    recipe = recipe_of(eval={"every": 60, "metric": "distance"}, preview={"every": 60, "n": 2})
    before = LatentReconstruction(setup_of(recipe))
    trainer = train(tmp_path / "a", recipe)
    method, first = trainer.method, before.validate(before.latents)
    assert first["distance"] == pytest.approx(
        load_latent_lpips("tiny-sd")(before.latents(), before.target).mean().item()
    )
    shown = load_space("tiny-sd").decode(method.latents()) - load_space("tiny-sd").decode(method.target)
    assert trainer.scores["pixel_mse"] == pytest.approx(shown.square().mean().item())
    assert trainer.scores["pixel_mse"] < 0.5 * first["pixel_mse"]
    assert trainer.scores["distance"] < first["distance"]
    assert trainer.best["distance"] == trainer.scores["distance"]
    assert len([*(tmp_path / "a" / "previews").iterdir()]) == 2
    noise = torch.zeros(1, 4, 8, 8)
    assert torch.equal(
        method.generate(method.latents, noise, Condition.none(1)), method.space.decode(method.latents()[:1])
    )
    tensors, meta = load_file(tmp_path / "a" / "checkpoints" / "last.safetensors")
    assert (meta["kind"], meta["space"]["name"]) == ("latents", "tiny-sd")
    assert torch.equal(load_weights(meta["network"], tensors, "x")(), method.latents())


@pytest.mark.long
@pytest.mark.parametrize(
    "distance",
    [
        {"kind": "latent_lpips"},
        {"kind": "e_latent_lpips", "augment": "bgco"},
        {"kind": "perceptual", "extractor": "lite0"},
    ],
)
def test_micro_batches_change_nothing_under_any_distance(tmp_path, distance):
    plain = {"name": "sgd", "lr": 1.0, "betas": [0.0, 0.9]}  # Adam makes whole steps of what is nothing but rounding
    whole = train(tmp_path / "a", recipe_of(distance, images=4, optim=plain))
    parts = train(tmp_path / "b", recipe_of(distance, images=4, micro_batch=1, optim=plain))
    torch.testing.assert_close(parts.method.latents(), whole.method.latents(), rtol=1e-3, atol=1e-3)
    assert not torch.equal(whole.method.latents(), LatentReconstruction(setup_of(recipe_of(distance))).latents())


def test_latents_of_the_images_are_drawn_once_or_are_the_means():
    sample, again, mean = (
        LatentReconstruction(setup_of(recipe_of(own={"encode": how}))).target for how in ("sample", "sample", "mean")
    )
    images = open_images("real:digits", resolution=32, channels=3, limit=2).images([0, 1])
    expected = load_space("tiny-sd").encode(images / 127.5 - 1, torch.zeros_like(mean))
    assert torch.equal(sample, again) and not torch.equal(sample, mean)
    torch.testing.assert_close(mean, expected)


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="batch: 2 latents, and .* has 1 images"):
        LatentReconstruction(setup_of(recipe_of(), limit=1))
    with pytest.raises(UserError, match="is grey"):
        LatentReconstruction(setup_of(recipe_of(), channels=1))
    with pytest.raises(UserError, match="multiples of 4 pixels"):
        LatentReconstruction(setup_of(recipe_of(), resolution=30))
    with pytest.raises(UserError, match="pixels are no latents"):
        LatentReconstruction(setup_of(recipe_of(own={"space": "pixels"})))
    with pytest.raises(UserError, match=r"no such|cannot|nowhere"):
        LatentReconstruction(setup_of(recipe_of(own={"judge": str(tmp_path / "nowhere.safetensors")})))
