"""Every name that was a recipe's file in the release before leads to a recipe with all the same settings.

`resolved_recipes.json` was written by that release: of each name the digest of its resolved recipe, without and with
--mini, over the keys that it knew (`keys`); what has come since is left out. Its `method: consistency` is there as
`d2o.recipes.former` renews it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from d2o.errors import UserError
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.listing import entries
from d2o.recipes.load import load_recipe
from d2o.settings.recipe_names import RENAMED

BEFORE = json.loads((Path(__file__).parent / "resolved_recipes.json").read_text())


def known(data: dict[str, Any], at: str = "") -> dict[str, Any]:
    """What the keys of the release before hold; of a free section everything."""
    keys = set(BEFORE["keys"])
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    kept = {}
    for key, value in data.items():
        path = f"{at}{key}"
        if path in keys:
            kept[key] = known(value, f"{path}.") if path in sections and isinstance(value, dict) else value
    return kept


def digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(known(data), sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize("family", sorted({name.split("_")[0] for name in BEFORE["recipes"]}))
def test_old_names_lead_to_the_same_settings(family, mini):
    for name, digests in BEFORE["recipes"].items():
        if name.split("_")[0] == family:
            assert digest(load_recipe(name, mini=mini).resolved()) == digests[mini], name


def test_all_old_names_are_found_and_all_new_ones_exist():
    names = set(recipe_names())
    assert set(RENAMED.values()) <= names
    for name in BEFORE["recipes"]:
        new = RENAMED.get(name, name)
        assert new in names, name
        for found in (find_recipe(name), find_recipe(f"recipes/{name}.yaml")):  # the latter may be a file of today
            path, variant = find_recipe(new)
            assert found.path.samefile(path) and found.variant == variant, name


def test_an_old_name_can_be_extended(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: sid_edm2_512_xs.yaml\nname: mine\nbatch: 64\n")
    recipe = load_recipe(mine)
    assert (recipe.name, recipe.batch, recipe.teacher) == ("mine", 64, "edm2-img512-xs")
    with pytest.raises(UserError, match="unknown recipe 'sid_edm2_512_xq'"):
        load_recipe("sid_edm2_512_xq")


@pytest.mark.parametrize("name, method", [("sid", "sid"), ("spi_gan", "spi-gan"), ("d2o-f", "gdd")])
def test_a_method_in_place_of_a_recipe(name, method):
    with pytest.raises(UserError) as caught:
        find_recipe(name)
    assert caught.value.message == f"{name!r} is a method, not a recipe"
    assert caught.value.hint == f"`d2o recipes --like {method}` lists its recipes"
    assert [entry for entry in entries(method) if entry.method == method]
