"""Students that a table's numbers are not of."""

from __future__ import annotations

import pytest

from d2o.evaluation.paper_protocols import PRESETS, find_preset
from d2o.evaluation.preset_check import sides_of
from d2o.recipes.load import load_recipe
from d2o.recipes.row_students import not_of, other_data, remark
from d2o.reports.paper_tables import PaperRow
from d2o.students.base import save_student
from tests.helpers import tiny_student

TEACHER = {"name": "tiny", "sha256": "0" * 64, "licence": "CC0-1.0"}


def made(recipe=None) -> str:
    record = {} if recipe is None else recipe.resolved()
    save_student("s.safetensors", tiny_student(), recipe=record, teacher=TEACHER, metrics={}, provenance=[])
    return "s.safetensors"


def row(recipe: str | None) -> PaperRow:
    return PaperRow.model_validate({"name": "a row", "x": "s.safetensors", "recipe": recipe})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_small_version_of_other_data_is_refused_in_words():
    why = not_of(row("d2g_sd_cfg3:gan"), made(load_recipe("d2g_sd_cfg3:gan", mini=True)), None)
    assert why is not None and "of teacher tiny-sd in place of sd15" in why and "d2o eval s.safetensors" in why
    why = not_of(row("spi_gan_cifar10:k1"), made(load_recipe("spi_gan_cifar10:k1", mini=True)), None)
    assert why is not None and "of images real:digits in place of" in why


def test_another_place_of_the_same_data_is_not():
    meant, small = load_recipe("sid_cifar10:cond_a1.0"), load_recipe("sid_cifar10:cond_a1.0", mini=True)
    copy = load_recipe("sid_cifar10:cond_a1.0", ["teacher=my/edm.safetensors"])
    assert other_data(copy, meant, small) is None and other_data(small, meant, small) is not None
    assert other_data(meant, meant, None) is None


def test_images_of_another_size_than_the_protocol_s_are_refused():
    preset = find_preset("gdd_cifar10")
    why = not_of(row(None), made(), preset)
    assert why is not None and "images of 8x8; the protocol gdd_cifar10 is of CIFAR-10" in why and "(32x32)" in why
    assert not_of(row(None), made(), None) is None
    assert not_of(row(None), "not here.safetensors", preset) is None  # which the evaluation says


def test_the_sizes_that_protocols_name():
    assert sides_of(PRESETS["gdd_cifar10"]) == {32} and sides_of(PRESETS["sida_edm2_512"]) == {512}
    assert sides_of(PRESETS["ddgan"]) == {32, 256} and sides_of(PRESETS["d2g_coco2014"]) == set()


def test_a_training_of_another_length_is_marked():
    full, small = load_recipe("quickstart"), load_recipe("quickstart", mini=True)
    assert not_of(row("quickstart"), made(small), None) is None  # the same digits
    said = remark(row("quickstart"), made(small))
    assert said == f"a row: trained on {small.images:,} images; its recipe has {full.images:,}"
    assert remark(row("quickstart"), made(full)) is None and remark(row(None), made(small)) is None
