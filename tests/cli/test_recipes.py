"""`d2o recipes`, and variants on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2o.cli.app import main
from d2o.recipes.editor import recipe_schema, schema_text
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.layers import read_recipe
from d2o.recipes.load import load_recipe
from d2o.settings.wording import child
from d2o.settings.yaml_text import Problems, plain
from d2o.shipped import recipe_folders


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(line: str, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as done:
            main(line.split(" "))
        printed = capsys.readouterr()
        assert done.value.code == code, printed.err
        return printed

    return run


@pytest.mark.long
def test_the_list_says_what_each_reproduces_and_whether_it_runs_here(run, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    out = run("recipes --like spi_gan_cifar10")[0]
    lines = [line for line in out.splitlines() if "spi-gan" in line]
    assert [line.split()[0] for line in lines] == [n for n in recipe_names() if n.startswith("spi_gan_cifar10")]
    assert "needs cifar-10-python.tar.gz" in lines[0] and "fid 3.09" in out
    assert run("recipes --like quickstart")[0].split("\n")[3].split()[-1] == "yes"
    assert "no recipe has 'zzz' in it" in run("recipes --like zzz", 2)[1]


def test_all_recipes_are_listed(run):
    listed = {line.split()[0] for line in run("recipes")[0].splitlines() if line.strip()}
    assert set(recipe_names()) <= listed


def test_show_prints_what_a_run_would_have(run):
    out = run("recipes show sid_edm2_512 --variant s --set batch=64")[0]
    Path("again.yaml").write_text(out)
    assert load_recipe("again.yaml") == load_recipe("sid_edm2_512:s", ["batch=64"])


@pytest.mark.parametrize(
    "name", ["quickstart", "ode_digits:sde", "sid2a_edm2_512:m", "cd_digits:cd_i", "spi_gan_cifar10"]
)
def test_a_copy_is_the_same_recipe(run, name):
    run(f"recipes copy {name} mine/copy.yaml")
    for mini in (False, True):
        assert load_recipe("mine/copy.yaml", mini=mini) == load_recipe(name, mini=mini)
    before = Path("mine/copy.yaml").read_bytes()
    assert "is there already" in run(f"recipes copy {name} mine/copy.yaml", 2)[1]
    assert Path("mine/copy.yaml").read_bytes() == before


def test_a_copy_has_a_name_of_its_own(run):
    assert "wrote sid_edm2_512_xs.yaml" in run("recipes copy sid_edm2_512 --variant xs")[1]
    assert "sound: sid_edm2_512_xs" in run("recipes check sid_edm2_512_xs.yaml")[0]
    Path("mine").mkdir()
    for folder in ("mine", "other/"):
        assert "sid_edm2_512_xs.yaml" in run(f"recipes copy sid_edm2_512:xs {folder}")[1]
        assert Path(folder, "sid_edm2_512_xs.yaml").is_file()
    run("recipes copy sid_edm2_512")
    assert load_recipe("sid_edm2_512.yaml:l") == load_recipe("sid_edm2_512:l")


def test_check_tells_every_problem_with_its_line(run):
    Path("a.yaml").write_text("extends: quickstart\nbatch: 0\nvariants:\n  x: {optim: {lrr: 1}}\n")
    err = run("recipes check a.yaml", 2)[1]
    assert "a.yaml:2: batch: expected an integer >= 1, got 0" in err
    assert "a.yaml:4: variants.x.optim.lrr: unknown key; did you mean 'lr'?" in err


@pytest.mark.long
def test_explain(run):
    out = run("recipes explain alpha")[0]
    assert out.startswith("sid.alpha\n") and "weight of the squared difference" in out and "d2o/methods/sid.py" in out
    assert "default" in out and "a number" in out and "and 35 more" in out
    out = run("recipes explain clip_value")[0]
    assert "optim.clip_value" in out and "optim_critic.clip_value" in out
    assert "did you mean 'optim.lr'?" in run("recipes explain optim.lrr", 2)[1]
    whole = run("recipes explain sid")[0]
    assert "settings of method sid" in whole and "as its keys say" in whole and "d2o/methods/sid.py" in whole
    assert "d2o/training/optim_section.py" in out and "d2o/methods/cd.py" in run("recipes explain cd.form")[0]


@pytest.mark.long
def test_the_schema_that_ships_is_the_one_of_this_code(run):
    shipped = recipe_folders()[0] / "schema.json"
    assert shipped.read_text(encoding="utf-8") == schema_text(), "python -m d2o.cli.words writes it again"
    assert json.loads(run("recipes schema")[0]) == recipe_schema()
    run("recipes schema here.json")
    assert Path("here.json").read_text(encoding="utf-8") == schema_text()
    run("recipes schema here.json")  # the same once more
    Path("here.json").write_text("{}")
    assert "is there already" in run("recipes schema here.json", 2)[1]


@pytest.mark.long
def test_the_schema_knows_all_that_shipped_recipes_say():
    keys = recipe_schema()["definitions"]["keys"]

    def known(value, path):
        schema = keys
        for part in path:
            schema = child(schema, part)
            assert schema is not None, path
        for key, inner in value.items() if isinstance(value, dict) else ():
            known(inner, (*path, key))

    for name in recipe_names():
        whole = plain(read_recipe(find_recipe(name), Problems()))
        known(whole.pop("mini"), ())
        known(whole, ())


def test_variants_and_old_names_on_the_command_line(run):
    for name in ("ode_digits:l1", "ode_digits --variant l1", "recipes/ode_digits.yaml --variant l1", "ode_digits_l1"):
        out, err = run(f"recipes show {name}")
        assert out.startswith("name: ode_digits_l1\n")
        note = "ode_digits_l1 is called ode_digits:l1 now; the old name goes with the next release"
        assert (note in err) == (name == "ode_digits_l1")
    assert "ode_digits_l1: method ode" in run("train ode_digits --variant l1 --mini --plan")[0]
    assert "names a variant already (l1)" in run("train ode_digits:l1 --variant mse --plan", 2)[1]
    assert "choose one: ode_digits:mse, ode_digits:l1" in run("train ode_digits --plan", 2)[1]
    twice = run("recipes show ode_digits --variant mse --variant l1", 2)[1]
    assert "--variant: mse, l1: a recipe is trained as one of its variants" in twice
    assert "loss: l1" in run("recipes show ode_digits:mse --set ode.loss=l1")[0]


@pytest.mark.long
def test_list_is_what_recipes_alone_prints(run):
    assert run("recipes list --like quickstart") == run("recipes --like quickstart")
    assert "d2o recipes list --like TEXT" in run("recipes --like x show quickstart", 2)[1]


def test_an_unknown_name_is_answered_with_the_nearest_and_a_list_without_variants(run):
    err = run("recipes show sid_edm2_51:xs", 2)[1]
    assert "did you mean 'sid_edm2_512:xs'?" in err and " cd_cifar10, cd_digits, " in err
    assert "`d2o recipes` lists their variants too" in err


def test_names_of_the_release_before_in_a_file_are_noted_once(run):
    Path("a.yaml").write_text("extends: cd_digits\nname: a\nmethod: consistency\nconsistency: {kind: cd, N: 9}\n")
    for line in ("show a.yaml", "check a.yaml"):
        assert run(f"recipes {line}")[1].count("the old name goes with the next release") == 1
    assert "N: 9" in run("recipes show a.yaml")[0]
