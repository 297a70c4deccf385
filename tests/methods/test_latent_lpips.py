"""Stage two of LatentLPIPS: which of two distorted copies is nearer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from d2o.data.images import to_float
from d2o.data.triplets import open_triplets
from d2o.errors import MissingImages, UserError
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import load_file, save_file
from d2o.losses.latent_lpips import SHIPPED, load_latent_lpips
from d2o.losses.perceptual import perceptual
from d2o.losses.two_afc import agreement, ranking_inputs, weighted
from d2o.methods.base import Setup
from d2o.methods.latent_lpips import LatentLpipsMethod
from d2o.networks.build import build_network
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag
from d2o.spaces.load import load_space
from d2o.students.base import checkpoint_meta
from d2o.training.loop import Trainer

MADE = "real:digits-2afc/a"


# The triplets ---------------------------------------------------------------------------------------------------------


def test_made_triplets_are_the_same_again_and_their_order_is_known():
    found, again = open_triplets(MADE, channels=3, limit=20), open_triplets(MADE, channels=3, limit=20)
    assert found.fingerprint == again.fingerprint and found.shape == (9, 32, 32) and len(found) == 80
    assert {*found.groups} == {"noise", "blur", "erase", "blend"}
    assert set(found.judgements.tolist()) == {0.0, 1.0}
    ref, p0, p1 = (to_float(part) for part in found.images(found.groups["blend"]).split(3, dim=1))
    near = torch.where(found.judgements[found.groups["blend"], None, None, None] == 1, p1, p0)
    far = p0 + p1 - near
    assert (near - ref).square().mean() < (far - ref).square().mean()
    other = open_triplets("real:digits-2afc/b", channels=3, limit=20)
    assert other.fingerprint != found.fingerprint


def bapps(folder, kinds=("cnn", "traditional"), n=3):
    """A folder in the layout of BAPPS, and its judgements by kind."""
    random, judged = np.random.default_rng(0), {}
    for kind in kinds:
        for side in ("ref", "p0", "p1", "judge"):
            (folder / kind / side).mkdir(parents=True)
        judged[kind] = [0.0, 0.2, 1.0][:n]
        for i, h in enumerate(judged[kind]):
            for side in ("ref", "p0", "p1"):
                pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / kind / side / f"{i:06d}.png")
            np.save(folder / kind / "judge" / f"{i:06d}.npy", np.array([h], np.float32))
    return judged


def test_a_folder_in_the_layout_of_bapps(tmp_path):
    judged = bapps(tmp_path)
    found = open_triplets(str(tmp_path))
    assert found.judgements.tolist() == pytest.approx(judged["cnn"] + judged["traditional"])
    assert {kind: rows.tolist() for kind, rows in found.groups.items()} == {"cnn": [0, 1, 2], "traditional": [3, 4, 5]}
    images = found.images([4, 0])
    for k, (kind, i) in enumerate([("traditional", 1), ("cnn", 0)]):
        for side, part in zip(("ref", "p0", "p1"), images[k].split(3), strict=True):
            pixels = np.array(Image.open(tmp_path / kind / side / f"{i:06d}.png"))
            assert np.array_equal(part.permute(1, 2, 0).numpy(), pixels)
    one = open_triplets(str(tmp_path / "cnn"), resolution=64, limit=2)
    assert one.shape == (9, 64, 64) and len(one) == 2 and [*one.groups] == ["cnn"]


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(MissingImages, match="no such folder"):
        open_triplets(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no triplets"):
        open_triplets(str(tmp_path))
    with pytest.raises(UserError, match="did you mean|known"):
        open_triplets("real:digits-2afc/c")
    bapps(tmp_path, ("cnn",))
    judge = tmp_path / "cnn" / "judge" / "000001.npy"
    np.save(judge, np.array([1.5]))
    with pytest.raises(UserError, match=r"000001.npy holds .* not one number from 0 to 1"):
        open_triplets(str(tmp_path))
    judge.write_bytes(b"x")
    with pytest.raises(UserError, match=r"000001.npy is no readable .npy"):
        open_triplets(str(tmp_path))
    judge.unlink()
    with pytest.raises(UserError, match=r"no judgement .*000001.npy"):
        open_triplets(str(tmp_path))
    (tmp_path / "cnn" / "p1" / "000002.png").unlink()
    with pytest.raises(UserError, match="names differ"):
        open_triplets(str(tmp_path))


# The loss -------------------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    d0, d1 = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([2.0, 1.0, 1.0])
    assert agreement(d0, d1, torch.tensor([0.25, 0.25, 0.25])).tolist() == [0.75, 0.25, 0.5]


def test_ranking_inputs_by_hand():
    found = ranking_inputs(torch.tensor([0.4]), torch.tensor([0.1]))
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.1, 0.3, 2.0, 0.2]]))


def test_weighted_is_the_distance():
    torch.manual_seed(0)
    maps, weights = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)], [torch.rand(3), torch.rand(5)]
    expected = perceptual(maps[0][:1], maps[0][1:], lambda x: [x], weights[:1])
    f = maps[0] / (maps[0].square().sum(1, keepdim=True) + 1e-8).sqrt()
    torch.testing.assert_close(weighted([(f[:1] - f[1:]).square()], weights[:1]), expected)
    torch.testing.assert_close(weighted(maps, weights, [torch.zeros_like(m) for m in maps]), torch.zeros(2))


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trunk(tmp_path):
    """A stage-one checkpoint with random weights."""
    torch.manual_seed(0)
    network = build_network(
        {"arch": "latent_classifier", "channels": 4, "classes": 3, "width": 2, "hidden": 4, "side": 2}
    )
    path = tmp_path / "trunk.safetensors"
    meta = checkpoint_meta("latent_classifier", network.config, None, space=load_space("tiny-sd").record)
    save_file(path, network.state_dict(), meta)
    return path


def recipe_of(trunk, own=None, **rest) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "t",
            "method": "latent-lpips",
            "latent_lpips": {"space": "tiny-sd", "trunk": str(trunk), "holdout": 0.25, **(own or {})},
            "optim": {"lr": 0.05, "betas": [0.5, 0.999]},
            "batch": 4,
            "images": 12,
            "threads": 1,
            **rest,
        }
    )


def setup_of(recipe, images=None) -> Setup:
    images = images or open_triplets(MADE, channels=3, limit=4)
    return Setup(recipe.options, network=recipe.network, images=images, batch=recipe.batch, seed=recipe.seed)


def train(folder, recipe, images=None):
    folder.mkdir()
    Trainer(recipe, setup_of(recipe, images), folder).run(lambda *_: None, StopFlag())
    return load_file(folder / "checkpoints" / "last.safetensors")


@pytest.mark.long
def test_the_heads_are_trained_and_nothing_else(tmp_path, trunk):
    recipe = recipe_of(trunk, {"taps": "pre_pool"}, eval={"every": 12, "metric": "accuracy"})
    begun = LatentLpipsMethod(setup_of(recipe)).distance
    tensors, meta = train(tmp_path / "a", recipe)
    scores = dict(meta["metrics"])
    mean = scores.pop("accuracy")
    assert scores and mean == pytest.approx(np.mean([*scores.values()])) and 0 <= mean <= 1
    stage_one, _ = load_file(trunk)
    for name, tensor in tensors.items():
        if name.startswith("net."):
            assert torch.equal(tensor, stage_one[name.replace("net.", "trunk.")]), name
        else:
            assert tensor.min() >= 0 and tensor.shape == begun.state_dict()[name].shape
    distance = load_latent_lpips("tiny-sd", tmp_path / "a" / "checkpoints" / "last.safetensors")
    z = torch.randn(2, 4, 8, 8)
    assert distance(z, z).abs().max() == 0 and distance(z, z.flip(0)).min() > 0
    assert distance.features.network.net.taps == "pre_pool"


@pytest.mark.long
def test_micro_batches_change_nothing(tmp_path, trunk):
    whole, _ = train(tmp_path / "a", recipe_of(trunk))
    parts, _ = train(tmp_path / "b", recipe_of(trunk, micro_batch=2))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("own", [{"encode": "mean", "dropout": 0.0}, {"validate_encode": "sample"}])
def test_ways_to_encode_and_a_folder_of_bapps(tmp_path, trunk, own):
    bapps(tmp_path / "data", ("superres", "deblur", "color", "frameinterp"))
    path = str(tmp_path / "data")
    recipe = recipe_of(trunk, {**own, "validation": path}, eval={"every": 12, "metric": "accuracy"})
    _, meta = train(tmp_path / "a", recipe, open_triplets(path))
    scores = meta["metrics"]
    kinds = [scores[f"2afc_{kind}"] for kind in ("superres", "deblur", "color", "frameinterp")]
    assert scores["2afc_real"] == pytest.approx(np.mean(kinds)) == scores["accuracy"]


def test_the_rate_is_constant_and_then_falls_after_each_epoch(trunk):
    recipe = recipe_of(trunk, {"constant_epochs": 1, "decay_epochs": 2, "holdout": 0.0})
    method = LatentLpipsMethod(setup_of(recipe))  # 16 triplets: 4 iterations an epoch
    assert [method.rate(i) for i in (0, 3, 4, 7, 8, 11, 12)] == [1, 1, 1, 1, 0.5, 0.5, 0]


@pytest.mark.long
def test_mistakes_are_told(tmp_path, trunk):
    with pytest.raises(UserError, match="data.resolution|multiples of 4"):
        images = open_triplets(MADE, channels=3, resolution=30, limit=2)
        LatentLpipsMethod(setup_of(recipe_of(trunk), images))
    with pytest.raises(UserError, match="is grey"):
        LatentLpipsMethod(setup_of(recipe_of(trunk), open_triplets(MADE, limit=2)))
    with pytest.raises(UserError, match="leave it away|form of its trunk"):
        LatentLpipsMethod(setup_of(recipe_of(trunk, network={"arch": "latent_lpips"})))
    tensors, meta = load_file(trunk)
    save_file(tmp_path / "x.safetensors", tensors, {**meta, "space": {"name": "other", "sha256": "0" * 64}})
    with pytest.raises(UserError, match="autoencoder"):
        LatentLpipsMethod(setup_of(recipe_of(tmp_path / "x.safetensors")))
    save_file(tmp_path / "y.safetensors", tensors, {**meta, "kind": "extractor"})
    with pytest.raises(UserError, match="holds a extractor"):
        LatentLpipsMethod(setup_of(recipe_of(tmp_path / "y.safetensors")))


# What ships -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_shipped_distance_knows_the_order_better_than_the_mean_squared_error_of_latents():
    path = asset(SHIPPED["tiny-sd"])
    assert path.stat().st_size < 1_000_000
    distance, space = load_latent_lpips("tiny-sd", path), load_space("tiny-sd")
    assert distance.features.network.config["width"] == 6
    triplets = open_triplets("real:digits-2afc/b", channels=3, limit=100)  # digits that it was not trained on
    scores = {}
    for kind, rows in triplets.groups.items():
        sides = [to_float(part) for part in triplets.images(rows).split(3, dim=1)]
        ref, p0, p1 = (space.encode(x, torch.zeros(len(x), 4, 8, 8)) for x in sides)
        with torch.no_grad():
            judged, target = triplets.judgements[rows], distance.target(ref)
            mse = agreement((p0 - ref).square().mean((1, 2, 3)), (p1 - ref).square().mean((1, 2, 3)), judged)
            scores[kind] = (
                float(agreement(distance(p0, target), distance(p1, target), judged).mean()),
                float(mse.mean()),
            )
    mine, mse = (np.mean([pair[i] for pair in scores.values()]) for i in (0, 1))
    assert mine > mse + 0.05, scores
