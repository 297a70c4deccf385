"""The recipes and assets that ship: every one loads, plans and runs; the builtin teacher and classifier can be trained
again."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch

import d2o
from d2o.cli.app import main
from d2o.evaluation.named_extractors import load_extractor
from d2o.interop.assets import asset
from d2o.interop.safetensors_io import read_meta
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.settings.recipe_names import RENAMED
from d2o.teachers.registry import BUILTIN
from tests.helpers import but_for


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in arguments])
    return done.value.code  # type: ignore[return-value]


RUNS = {new: old for old, new in RENAMED.items()}
TEACHERS: dict = {}  # of all plans, so that each is built once


def brought(recipe) -> bool:
    """Data that the user brings."""
    return recipe.data is not None and not recipe.data.path.startswith("real:")


FULL = [(name, False) for name in recipe_names()]
SMALL = [(name, True) for name in recipe_names() if ":" not in name]  # test_minis trains them all


@pytest.mark.parametrize("name, mini", but_for(lambda name, mini: not (":" in name or mini), FULL + SMALL))
def test_every_recipe_loads_plans_and_says_how_to_run_it(name, mini, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # what is fetched when it is needed is not missing
    recipe = load_recipe(name, mini=mini)
    plan = make_plan(recipe, teachers=TEACHERS)
    assert recipe.name in (name.replace(":", "_"), RUNS.get(name)) and sum(plan.networks.values()) > 1000
    if recipe.method in (
        "sid",
        "dmd",
        "cd",
        "pd",
        "ctm",
    ):  # a GAN's batch is divided among GPUs, not into micro-batches
        assert sum(plan.memory.values()) < 80e9
    teacher = f"teacher {recipe.teacher} is not on this machine"
    published = (teacher, "the weights '", "reference edm")
    assert [f for f in plan.first if "pair store" in f or (f.startswith(published) and not mini)] == plan.first
    begun = recipe.options.critic.pretrained if recipe.method == "gdd" else None  # its run, which the head makes
    if begun is None:
        assert not plan.refused
    else:
        (why,) = plan.refused
        assert why.startswith(f"critic.pretrained: {begun} has no checkpoints/state.safetensors") and not mini
    asked = recipe.pairs.prompts if recipe.pairs and recipe.pairs.prompts != "digits" else None
    bring = [recipe.data.path] if brought(recipe) else [f"no such file: {asked}"] if asked else []
    assert [f for f in plan.missing if any(what in f for what in bring)] == plan.missing
    path, variant = find_recipe(name)
    head = "".join(itertools.takewhile(lambda line: line.startswith("#"), path.open(encoding="utf-8")))
    assert f"recipes/{path.name}" in head or f"{path.stem}:" in head
    assert "Cost" in head or "cost" in head or "budget" in head
    assert "eproduces" in head or not recipe.reproduces
    assert variant is None or re.search(rf"[:\s(]{re.escape(variant)}[\s,)]", head), "the head says what it is"
    if mini:
        assert recipe.images <= 40_000 and not brought(recipe)


def test_plan_of_the_quickstart_by_hand():
    plan = make_plan(load_recipe("quickstart", ["pairs.path=nowhere"]))
    n = sum(p.numel() for p in d2o.load_teacher("digits").network.parameters())
    assert 0.6e6 < n < 0.8e6
    assert plan.networks == {"teacher (frozen)": n, "student": n}
    assert plan.memory["optimiser (adam)"] == 8 * n and plan.memory["EMA"] == 4 * n
    assert plan.calls["making pairs"] == 4096 * 35 and plan.disk["pairs (nowhere)"] == 4096 * 64 * 4


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_the_classifier_can_be_trained_again(tmp_path):
    assert run("train", "classifier_digits", "--mini", "--out", tmp_path / "c") == 0
    meta = read_meta(tmp_path / "c" / "checkpoints" / "best.safetensors")
    assert meta["kind"] == "extractor" and meta["metrics"]["accuracy"] > 0.85
    extractor = load_extractor(str(tmp_path / "c" / "checkpoints" / "best.safetensors"))
    assert extractor.features(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 64)


@pytest.mark.long
def test_the_teacher_can_be_trained_again_and_used(tmp_path):
    out = tmp_path / "t"
    assert (
        run(
            "train",
            "teacher_digits",
            "--mini",
            "--out",
            out,
            "--set",
            "batch=128",
            "--set",
            "images=6400",
            "--set",
            "eval={every: 3200, n: 200}",
        )
        == 0
    )
    scores = [line["eval"] for line in log(out) if "eval" in line]
    assert scores[-1]["fd"] < 0.85 * scores[0]["fd"]
    teacher = d2o.load_teacher(out / "checkpoints" / "last.safetensors")
    assert teacher.spec.classes == 10 and teacher.spec.licence == "CC-BY-4.0" and teacher.spec.name == "teacher_digits"
    pairs = tmp_path / "pairs"
    assert (
        run("pairs", "--teacher", out / "checkpoints" / "last.safetensors", "--n", 8, "--steps", 3, "--out", pairs) == 0
    )
    assert len(d2o.PairStore(pairs)) == 8


@pytest.mark.long
def test_the_perceptual_loss_trains(tmp_path):
    small = [
        "--set",
        f"pairs.path={tmp_path / 'pairs'}",
        "--set",
        "pairs.n=128",
        "--set",
        "pairs.steps=4",
        "--set",
        "images=1280",
    ]
    small += ["--set", "eval={every: 1280, n: 64}", "--set", "preview=null", "--set", "log_every=2"]
    assert run("train", "ode_digits:perceptual", "--mini", "--out", tmp_path / "r", *small) == 0
    losses = [line["loss"] for line in log(tmp_path / "r") if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_assets_say_what_made_them_and_are_good():
    for name in (name for name in BUILTIN.values() if asset(name).is_file()):  # folders have a card
        meta = read_meta(asset(name))
        licence, size = {
            "teacher_digits": ("CC-BY-4.0", 3_000_000),
            "teacher_cifar16": ("not stated", 8_000_000),  # CIFAR-10 comes without one
        }[meta["recipe"]["name"]]
        assert meta["kind"] == "teacher" and meta["spec"]["licence"] == licence
        assert meta["recipe"]["name"] == name.removesuffix(".safetensors") and asset(name).stat().st_size <= size
    meta = read_meta(asset("classifier_digits.safetensors"))
    assert meta["recipe"]["name"] == "classifier_digits" and meta["metrics"]["accuracy"] > 0.98


@pytest.mark.long
def test_the_teacher_draws_the_digit_it_is_asked_for():
    teacher, extractor = d2o.load_teacher("digits"), load_extractor("digits")
    labels = torch.arange(40) % 10
    noise = torch.randn(40, *teacher.spec.shape, generator=torch.Generator().manual_seed(0))
    images = teacher.decode(teacher.sample(noise, labels, steps=8))
    from d2o.data.images import to_uint8

    assert (extractor.logits(to_uint8(images)).argmax(1) == labels).float().mean() > 0.9
    strong = teacher.decode(teacher.sample(noise, labels, steps=8, cfg=1.5))
    assert (extractor.logits(to_uint8(strong)).argmax(1) == labels).float().mean() > 0.95
