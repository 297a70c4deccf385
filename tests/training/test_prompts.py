"""The prompts of a recipe: read and checked before anything costly, one for each image where there are images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2o.data.images import open_images
from d2o.data.prompts import Prompts
from d2o.errors import UserError
from d2o.methods.base import Setup
from d2o.recipes.load import load_recipe
from d2o.training.batches import ImageBatches
from d2o.training.setup import check_captions, prompts_of

RECIPE = "{name: t, method: sid, teacher: tiny-sd, optim: {lr: 0.1}, batch: 4, images: 8, student: {sigma: 2.5}}"


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "t.yaml").write_text(RECIPE)
    (tmp_path / "p.txt").write_text("a\nb\n")
    return lambda *overrides: load_recipe(tmp_path / "t.yaml", [o.format(tmp_path) for o in overrides])


def test_prompts_come_from_the_recipe_or_its_pairs(recipe):
    assert list(prompts_of(recipe("prompts={}/p.txt"), True)) == ["a", "b"]
    both = recipe("prompts={}/p.txt", "pairs={{n: 2, prompts: other.txt}}")
    assert len(prompts_of(both, True)) == 2
    assert len(prompts_of(recipe("pairs={{n: 2, prompts: {}/p.txt}}"), True)) == 2
    assert prompts_of(recipe(), False) is None
    for made, text, words in (
        (recipe(), True, "takes prompts, and the recipe has no `prompts:`"),
        (recipe("prompts={}/p.txt"), False, "takes none"),
        (recipe("prompts={}/nowhere.txt"), True, "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            prompts_of(made, text)


def test_images_have_one_each(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 6, 6, 1), np.uint8))
    images, texts = open_images(tmp_path / "x.npz"), Prompts.from_list(["a", "b", "c", "d"])
    batches = ImageBatches(images, 4, 0, (0, 4), torch.device("cpu"), prompts=texts)
    index = batches.positions(0)
    assert batches.get(0).condition.prompts == tuple("abcd"[i] for i in index)
    batches.close()
    check_captions(Setup(None, images=images, prompts=texts))
    with pytest.raises(UserError, match="3 for the 4 images"):
        check_captions(Setup(None, images=images, prompts=Prompts.from_list(["a", "b", "c"])))
