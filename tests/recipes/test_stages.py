"""Network evaluations of both stages and their pairs, as the papers print them."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan
from d2o.recipes.stages import AS_PAPERS, BOTH_STAGES, WITH_PAIRS, as_papers_count, stage_before
from d2o.students.base import save_student
from tests.helpers import tiny_student

MILLION = 1_000_000
PASSES = "training (forward passes of trained networks)"


@pytest.mark.parametrize(
    ("name", "both", "pairs"),
    [("d2g_sd_cfg3", 51.2, 150), ("d2g_sd_cfg8", 153.6, 600), ("d2g_sdxl_cfg7", 97.28, 400)],
)
def test_both_stages_are_counted_from_the_second(name, both, pairs):
    """Diffusion2GAN, Table A1, exactly; the store that both stages are of counts once."""
    recipe = load_recipe(f"{name}:gan")
    before = stage_before(Path(f"runs/{name}_ode"), recipe)
    assert before == load_recipe(f"{name}:ode")
    found = as_papers_count(recipe, 1, before, 1)
    assert found[BOTH_STAGES] == round(both * MILLION) and found[WITH_PAIRS] == round((both + pairs) * MILLION)
    assert found[AS_PAPERS] == 5 * recipe.images


@pytest.mark.parametrize(("variant", "millions"), [("500k", 94.3), ("1m", 111.8), ("50k", 78.55)])
def test_one_stage_and_its_pairs(variant, millions):
    """Table 6, and 76.8M of training alone."""
    found = as_papers_count(load_recipe(f"d2g_cifar10:{variant}"), 1, None, 1)
    assert found == {AS_PAPERS: round(76.8 * MILLION), WITH_PAIRS: round(millions * MILLION)}


def test_stages_of_different_pairs_count_both_stores():
    recipe, before = load_recipe("d2g_sd_cfg8:gan"), load_recipe("d2g_sd_cfg3:ode")
    found = as_papers_count(recipe, 1, before, 1)
    assert found[WITH_PAIRS] == found[BOTH_STAGES] + 600 * MILLION + 150 * MILLION
    assert as_papers_count(load_recipe("sid_digits"), 1, None, 1) == {}  # papers count none of these
    assert as_papers_count(recipe, 1, load_recipe("sid_digits"), 1) == {AS_PAPERS: 51_200_000}


def test_the_stage_before_is_what_the_student_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gan, ode = load_recipe("d2g_sd_cfg3:gan", mini=True), load_recipe("d2g_sd_cfg3:ode", ["images=24"], mini=True)
    teacher = {"name": "tiny", "sha256": "0" * 64, "licence": "CC0-1.0"}
    save_student("s.safetensors", tiny_student(), recipe=ode.resolved(), teacher=teacher, metrics={}, provenance=[])
    assert stage_before(Path("s.safetensors"), gan) == ode
    assert stage_before(Path("runs/d2g_sd_cfg3_ode"), gan) == load_recipe("d2g_sd_cfg3:ode", mini=True)
    assert stage_before(Path("runs/d2g_sd_cfg8_ode"), load_recipe("d2g_sd_cfg3:gan")) is None  # of other pairs
    assert stage_before(Path("runs/nobody_s"), gan) is None
    tiny_student(Path("silent.safetensors"))
    assert stage_before(Path("silent.safetensors"), gan) is None


def test_a_second_stage_is_planned_without_the_first(tmp_path, monkeypatch):
    """All of it, with the beginning among what is missing; R1 of one sample is due in the first of 16 iterations."""
    monkeypatch.chdir(tmp_path)
    plan = make_plan(load_recipe("d2g_sd_cfg3:gan", mini=True), Path("runs/d2g_sd_cfg3_ode"))
    assert plan.whole and plan.missing == ["no such file: runs/d2g_sd_cfg3_ode"] and not plan.refused
    assert plan.calls[PASSES] == 5 * 32 + 1 and plan.calls[AS_PAPERS] == 5 * 32
    assert plan.calls[BOTH_STAGES] == 224 and plan.calls[WITH_PAIRS] == 224 + 64 * 10
    assert "critic" in plan.networks and plan.memory["EMA"] > 0


@pytest.mark.long
def test_the_plan_of_stable_diffusion_s_second_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = make_plan(load_recipe("d2g_sd_cfg3:gan"), Path("runs/d2g_sd_cfg3_ode")).calls
    assert calls[BOTH_STAGES] == 51_200_000 and calls[WITH_PAIRS] == 201_200_000
    assert calls[PASSES] == 12_800_000 + 625  # 10,000 iterations, R1 of one row in every 16th
