"""What a LoRA cannot hold is refused."""

from __future__ import annotations

import pytest

from d2o.errors import UserError
from d2o.recipes.load import load_recipe
from d2o.recipes.plan import make_plan


def test_a_lora_has_no_place_for_the_guidance_scale():
    recipe = load_recipe("d2g_tiny_sd:cfg", ["student.lora=4"], mini=True)
    assert any("student.lora: a LoRA has no place" in line for line in make_plan(recipe).refused)


def test_rank_must_be_positive():
    with pytest.raises(UserError, match="lora"):
        load_recipe("d2g_tiny_sd", ["student.lora=0"], mini=True)
