"""Named changes of a recipe: `variants:`, FILE:VARIANT, and what extends them."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.recipes.checking import check_runs
from d2o.recipes.load import load_recipe
from d2o.recipes.sweep import plan_sweep
from d2o.settings.recipe_names import parted, variants_in

BASE = """\
name: base
method: ode
teacher: digits
seed: 1
data: {path: real:digits, licence: CC-BY-4.0}
optim: {lr: 1e-3, betas: [0.5, 0.9]}
batch: 8
images: 1000
reproduces: {paper: one, value: {fid: 3}}
mini: {images: 10, seed: 7}
variants:
  small:
    title: the small one
    optim: {lr: 1e-4}
    reproduces: {table: 2, value: {fid: 4}}
    mini: {images: 5}
  other:
    name: somebody
    data: {path: elsewhere}
    seed: null
  plain:
"""
CHILD = """\
extends: base
name: child
optim: {lr: 5e-4}
variants:
  small: {batch: 4}
  own: {images: 7}
"""


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("child.yaml").write_text(CHILD)


def fails(name: str, *more) -> UserError:
    with pytest.raises(UserError) as caught:
        load_recipe(name, *more)
    return caught.value


def test_a_variant_goes_over_its_recipe_and_under_mini_and_set():
    plain, small = load_recipe("base.yaml"), load_recipe("base.yaml:small")
    assert (plain.name, plain.optim.lr, plain.title) == ("base", 1e-3, "")
    assert (small.name, small.optim.lr, small.optim.betas, small.title) == (
        "base_small",
        1e-4,
        (0.5, 0.9),
        "the small one",
    )
    assert small.reproduces == {"paper": "one", "value": {"fid": 4}, "table": 2}
    tiny = load_recipe("base.yaml:small", ["optim.lr=3e-4"], mini=True)
    assert (tiny.images, tiny.seed, tiny.optim.lr) == (5, 7, 3e-4)
    assert load_recipe("base.yaml:plain").resolved() == {**plain.resolved(), "name": "base_plain"}


def test_a_variant_may_name_its_run_and_take_back_what_the_recipe_says():
    other = load_recipe("base.yaml:other")
    assert (other.name, other.seed, other.data.licence) == ("somebody", 0, None)  # other images, another licence


def test_who_extends_a_recipe_has_its_variants_and_goes_over_them():
    small = load_recipe("child.yaml:small")
    assert (small.name, small.optim.lr, small.batch, small.title) == ("child_small", 5e-4, 4, "the small one")
    assert load_recipe("child.yaml:own").images == 7 and load_recipe("child.yaml:other").name == "child_other"


def test_a_variant_can_be_extended():
    Path("mine.yaml").write_text("extends: base.yaml:small\nbatch: 2\n")
    mine = load_recipe("mine.yaml")
    assert (mine.name, mine.batch, mine.optim.lr) == ("base_small", 2, 1e-4)
    assert "no variants" in fails("mine.yaml:small").message  # they are changes of the recipe itself
    Path("mine.yaml").write_text("extends: base.yaml:smal\n")
    assert fails("mine.yaml").message == "mine.yaml:1: extends: base.yaml has no variant 'smal'; did you mean 'small'?"


def test_a_file_without_a_name_is_only_its_variants():
    Path("base.yaml").write_text(BASE.replace("name: base\n", ""))
    error = fails("base.yaml")
    assert error.message == "base.yaml is trained as one of its variants"
    assert error.hint == "choose one: base:small, base:other, base:plain"
    assert load_recipe("base.yaml:small").name == "base_small"
    assert "is trained as one of its variants" in fails("child.yaml").message
    assert load_recipe("child.yaml:own").name == "child_own"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base.yaml:smal", "base.yaml has no variant 'smal'; did you mean 'small'?"),
        ("child.yaml:zzz", "child.yaml has no variant 'zzz'"),
        ("quickstart:xs", "quickstart.yaml has no variants, so no 'xs'"),
        ("bse.yaml:small", "no such recipe file: 'bse.yaml:small'"),
        ("sid_edm2_51:xs", "unknown recipe 'sid_edm2_51:xs': did you mean 'sid_edm2_512:xs'?"),
    ],
)
def test_what_is_not_there(name, message):
    assert message in fails(name).message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("  small: {optim: {lrr: 1}}", "variants.small.optim.lrr: unknown key; did you mean 'lr'?"),
        ("  small: {batch: 0}", "variants.small.batch: expected an integer >= 1, got 0"),
        ("  small: {mini: {batch: 0}}", "variants.small.mini.batch: expected an integer >= 1, got 0"),
        ("  small: {extends: x}", "variants.small.extends: cannot stand in a variant"),
        ("  small: {variants: {}}", "variants.small.variants: cannot stand in a variant"),
        ("  small: {mini: {mini: {}}}", "variants.small.mini.mini: cannot stand in `mini:`"),
        ("  small: {}\n  a b: {}", "variants.a b: a variant is called by letters, digits and . _ + -"),
        ("  small: {}\n  two: 3", "variants.two: expected a section of recipe keys, got 3"),
    ],
)
def test_problems_name_the_line_of_the_variant(text, problem):
    head = BASE.partition("variants:\n")[0]
    Path("base.yaml").write_text(f"{head}variants:\n{text}\n")
    line = len(head.splitlines()) + 2 + text.count("\n")
    assert fails("base.yaml:small").message == f"base.yaml:{line}: {problem}"


def test_neither_a_list_nor_set_gives_variants():
    Path("base.yaml").write_text(BASE.partition("variants:\n")[0] + "variants: [1]\n")
    assert "base.yaml:11: variants: expected a section with a section of keys for each" in fails("base.yaml").message
    Path("base.yaml").write_text(BASE)
    assert "--set variants.x: cannot be set; it belongs in the file" in fails("base.yaml", ["variants.x=1"]).message


def test_sweeps_take_variants():
    sweep = plan_sweep("base.yaml:small", [], ["optim.lr=1e-4,2e-4"])
    assert [member.recipe.images for member in sweep.members] == [1000, 1000] and sweep.base.name == "base_small"


def test_check_finds_what_is_wrong_in_any_variant_once():
    assert [run.name for run in check_runs("base.yaml")] == ["base", "base_small", "somebody", "base_plain"]
    assert [run.name for run in check_runs("child.yaml:own")] == ["child_own"]
    Path("base.yaml").write_text(
        BASE.replace("lr: 1e-4", "lr: -1").replace("seed: null", "sed: 1").replace("batch: 8", "batch: x")
    )
    with pytest.raises(UserError) as caught:
        check_runs("base.yaml")
    assert caught.value.message.splitlines() == [
        "base.yaml:7: batch: expected an integer >= 1, got 'x'",
        "base.yaml:14: variants.small.optim.lr: expected a number > 0, got -1",
        "base.yaml:20: variants.other.sed: unknown key; did you mean 'seed'?",
    ]


def test_names_in_two_parts():
    assert parted("a:b") == ("a", "b") and parted("r/a.yaml:a1.0") == ("r/a.yaml", "a1.0")
    for whole in ("a", "C:\\x.yaml", "a:", ":b", "a:b c"):
        assert parted(whole) == (whole, None)


def test_variants_are_found_by_their_lines():
    assert variants_in(BASE) == {"small": "the small one", "other": "", "plain": ""}
    assert variants_in("variants:\n  # one\n  a1.0: {x: 1}\n\n  'b':\n    title: 'B'  # two\nmini:\n  c: 1\n") == {
        "a1.0": "",
        "b": "B",
    }
    assert variants_in("name: x\n") == {}
