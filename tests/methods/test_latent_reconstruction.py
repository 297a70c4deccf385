"""Latents that are moved by Adam until a distance to those of images is small."""

from __future__ import annotations

import pytest
import torch

from d2o.condition import Condition
from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.features.latent_vgg import LatentVggFeatures
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import load_file
from d2o.losses.latent_lpips import load_latent_lpips
from d2o.methods.base import Batch, Setup
from d2o.methods.latent_reconstruction import LatentReconstruction
from d2o.networks.load import load_weights
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag
from d2o.spaces.load import load_space
from d2o.training.loop import Trainer
from tests.methods import recording


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


def test_raw_latents_may_be_what_is_moved(tmp_path):
    """They begin as noise themselves; the distance, the judge and the decoder see them as the diffusion model does."""
    recipe = recipe_of(
        {"kind": "latent_lpips"}, {"latents": "raw"}, optim={"name": "sgd", "lr": 1.0, "betas": [0, 0.9]}
    )
    raw, scaled = LatentReconstruction(setup_of(recipe)), LatentReconstruction(setup_of(recipe_of()))
    assert torch.equal(raw.latents(), scaled.latents()) and torch.equal(raw.target, scaled.target)
    numbers = load_space("tiny-sd").numbers
    seen = numbers.normalise(raw.latents())
    assert not torch.allclose(seen, raw.latents(), atol=1e-2)
    expected = load_latent_lpips("tiny-sd")(seen, raw.target).mean().item()
    assert raw.validate(raw.latents)["distance"] == pytest.approx(expected)
    shown = raw.generate(raw.latents, torch.zeros(2, 4, 8, 8), Condition.none(2))
    assert torch.equal(shown, raw.space.decode(seen))
    assert raw.describe()["latents"] == "raw" and "latents" not in scaled.describe()
    before = raw.latents().detach().clone()
    trainer = train(tmp_path / "a", recipe.model_copy(update={"images": 2}))
    x = before.clone().requires_grad_()
    load_latent_lpips("tiny-sd")(x, numbers.raw(raw.target), raw=True).mean().backward()
    torch.testing.assert_close(trainer.method.latents(), before - x.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_the_images_latents_are_looked_at_once(monkeypatch, micro_batch):
    """And not in every step, where nothing random comes before the network."""
    looked = []
    maps = LatentVggFeatures.maps
    monkeypatch.setattr(LatentVggFeatures, "maps", lambda self, x: looked.append(len(x)) or maps(self, x))
    method = LatentReconstruction(setup_of(recipe_of({"kind": "latent_lpips"})))
    loop = recording.Loop(method, micro_batch, total=2)
    for iteration in range(3):
        method.step(loop, Batch(), iteration)
    assert looked == ([2, 2, 2, 2] if micro_batch is None else [1] * 8)


def test_latents_of_a_folder_are_compared_as_those_of_a_named_space():
    where = {"space": str(asset("tiny-sd"))}
    method = LatentReconstruction(setup_of(recipe_of({"kind": "latent_lpips", "space": "tiny-sd"}, where)))
    named = LatentReconstruction(setup_of(recipe_of({"kind": "latent_lpips"})))
    assert method.spec().space == where["space"] and method.validate(method.latents) == named.validate(named.latents)
    with pytest.raises(UserError, match="distance.space: sd15"):
        LatentReconstruction(setup_of(recipe_of({"kind": "latent_lpips"}, where)))


def test_the_recipe_moves_what_the_authors_do():
    """Raw latents at full size; `tiny-sd`'s curves are of scaled ones."""
    full, mini = (load_recipe("latent_reconstruction:bgco", mini=mini).options for mini in (False, True))
    assert (full.space, full.latents, full.distance.l1) == ("sd3", "raw", 0.0)
    assert (mini.space, mini.latents) == ("tiny-sd", "scaled")


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
