"""The prompts of a recipe: read and checked before anything costly, one for each image where there are images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from d2o.cli.app import main
from d2o.data.images import open_images
from d2o.data.prompt_files import open_prompts
from d2o.data.prompts import Prompts
from d2o.errors import UserError
from d2o.evaluation.quick import Evaluator
from d2o.interop.safetensors_io import save_file
from d2o.methods.base import Setup
from d2o.networks.classifier import Classifier
from d2o.recipes.load import load_recipe
from d2o.students.base import checkpoint_meta, load_student
from d2o.training.batches import ImageBatches
from d2o.training.setup import check_captions, learned_cfg, prompts_of

RECIPE = "{name: t, method: sid, teacher: tiny-sd, optim: {lr: 0.1}, batch: 4, images: 8, student: {sigma: 2.5}}"


MEASURED = """
{{name: t, method: sid, teacher: tiny-sd, student: {{sigma: 2.5}}, optim: {{lr: 1.0e-5}}, batch: 2, images: 4,
  threads: 1, prompts: {0}/p.txt, sid: {{sigma_min: 0.03, sigma_max: 14.0, cfg: 2.0, score_cfg: 2.0}},
  eval: {{every: 4, extractor: {0}/eyes.safetensors, reference: {0}/x.npz, n: 4, batch: 4}}}}
"""


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


def test_the_teacher_is_shown_guided_as_it_is_learned_from(recipe):
    assert learned_cfg(recipe()) == 1 and learned_cfg(recipe("sid={{cfg: 2.0}}")) == 2
    assert learned_cfg(recipe("sid={{cfg: 2.0}}", "pairs={{n: 2, cfg: 3.0}}")) == 3


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


@pytest.mark.long
def test_a_student_of_drawn_prompts_is_measured_by_them(tmp_path):
    """`prompts:` without pairs: the score is of what the checkpoint makes of these prompts."""
    (tmp_path / "p.txt").write_text("a handwritten seven\nthree\n")
    torch.manual_seed(0)
    eyes = Classifier(32, 3, 10, width=8, feature_dim=4)
    save_file(tmp_path / "eyes.safetensors", eyes.state_dict(), checkpoint_meta("extractor", eyes.config, None))
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8))
    (tmp_path / "r.yaml").write_text(MEASURED.format(tmp_path))
    run = tmp_path / "run"
    train = ["train", str(tmp_path / "r.yaml"), "--out", str(run), "--device", "cpu"]
    with pytest.raises(SystemExit) as refused:
        main([*train, "--set", "prompts=null", "--plan"])
    assert refused.value.code == 1  # told before anything is made
    with pytest.raises(SystemExit) as done:
        main(train)
    assert not done.value.code
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (score,) = [line["eval"]["fd"] for line in lines if "eval" in line]

    student, prompts = load_student(run / "checkpoints" / "last.safetensors"), open_prompts(tmp_path / "p.txt")
    evaluator = Evaluator(str(tmp_path / "eyes.safetensors"), str(tmp_path / "x.npz"), torch.device("cpu"))
    found = [
        evaluator.score(
            lambda z, asked: student.decode(student(z, asked)), student.spec, n=4, seed=2_000_000, prompts=of
        )["fd"]
        for of in (prompts, Prompts.from_list(["zero"]))
    ]
    assert found[0] == pytest.approx(score, rel=1e-3) and abs(found[1] - score) > 1e-3 * score
