"""Which trainings a table needs: what others begin from is one of them, be it a row or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o.cli.app import main
from d2o.interop.safetensors_io import save_file
from d2o.recipes.load import load_recipe
from d2o.recipes.table_runs import default_recipe, table_members
from d2o.reports.paper_tables import load_table, table_names
from d2o.settings.recipe_names import is_shipped
from d2o.training.checkpoint import state_file

SEEDED = """
title: Two stages, three seeds
paper: none
seeds: [1, 2]
rows:
  - {name: gan, x: runs/gan, recipe: "d2g_sd_cfg3:gan", start: runs/d2g_sd_cfg3_ode}
  - {name: from a stranger, x: runs/other, recipe: "d2g_sd_cfg3:gan", start: runs/nobody_s}
"""


@pytest.mark.parametrize("name", table_names())
def test_every_beginning_is_made_by_a_row_or_a_recipe_of_its_name(name):
    table = load_table(name)
    made = {row.x for row in table.rows if row.recipe}
    for row in table.rows:
        if row.start is not None and row.start not in made:
            source = default_recipe(row.start)
            assert source is not None and is_shipped(source)
            assert f"runs/{load_recipe(source).name}" == row.start


def test_a_beginning_that_no_row_makes_is_trained_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ode, gan = table_members("d2g_table3", ["images=16"], True, "runs/mini")
    assert (ode.source, ode.folder, ode.start) == ("d2g_sd_cfg3:ode", Path("runs/mini/d2g_sd_cfg3_ode"), None)
    assert gan.start == ode.folder and gan.made and not ode.made
    assert ode.recipe.teacher == "tiny-sd" and ode.recipe.images == 16  # --mini and --set are for it, too
    assert [one.name for one in table_members("d2g_table_a1", [], True, "there")][:2] == [
        "d2g_sd_cfg3_ode",
        "d2g_sd_cfg8_ode",
    ]
    Path("seeded.yaml").write_text(SEEDED)
    found = {one.name: one for one in table_members("seeded.yaml", [], True, "runs")}
    assert {name for name in found if "ode" in name} == {"d2g_sd_cfg3_ode_seed1", "d2g_sd_cfg3_ode_seed2"}
    assert found["d2g_sd_cfg3_ode_seed2"].recipe.seed == 2
    assert found["gan_seed2"].start == Path("runs/d2g_sd_cfg3_ode_seed2") and not found["other_seed1"].made


def test_a_beginning_that_is_here_is_begun_from_as_it_is(tmp_path, monkeypatch):
    """Whatever recipe it was made by; one that is not finished is gone on with."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/d2g_sd_cfg3_ode")
    state_file(folder).parent.mkdir(parents=True)

    def names() -> list[str]:
        return [one.name for one in table_members("d2g_table3", [], True, "runs")]

    recipe = load_recipe("d2g_sd_cfg3:ode", ["images=24"], mini=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    assert names() == ["d2g_sd_cfg3_ode", "d2g_sd_cfg3_gan"]  # nothing was saved yet
    save_file(state_file(folder), {}, {"kind": "state", "iteration": 2})
    assert names() == ["d2g_sd_cfg3_ode", "d2g_sd_cfg3_gan"]
    save_file(state_file(folder), {}, {"kind": "state", "iteration": 3})
    assert names() == ["d2g_sd_cfg3_gan"]
    (folder / "recipe.yaml").unlink()  # no run of d2o train
    assert names() == ["d2g_sd_cfg3_gan"]


def test_recipes_by_the_names_of_their_runs():
    assert default_recipe("runs/d2g_sdxl_cfg7_ode") == "d2g_sdxl_cfg7:ode"
    assert default_recipe("runs/quickstart") == "quickstart"
    assert default_recipe("quickstart") is None and default_recipe("runs/nobody_s") is None


@pytest.mark.long
def test_both_stages_of_a_paper_s_table_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def d2o(*words: str) -> int:
        with pytest.raises(SystemExit) as done:
            main(list(words))
        return int(done.value.code or 0)

    assert d2o("train", "--table", "d2g_table3", "--mini") == 0
    said = capsys.readouterr()
    assert "all 2 runs are finished" in said.err and "tiny-sd in place of sd15" in said.err
    assert "--runs" not in said.err.splitlines()[-1]  # the paper's table says nothing of these
    # 64 pairs in 10 guided steps are counted once; 64 images, and 32 in 5 passes with one single R1
    assert "together: 1,505 network calls" in said.out
    assert "d2g_sd_cfg3_gan: training, as papers count (NFE): 160 alone, 224 with the stage before, 864" in said.out
    assert d2o("train", "--table", "d2g_table3", "--mini") == 0
    assert "the 1 run is finished" in capsys.readouterr().err
    assert d2o("eval", "--table", "d2g_table3", "--runs", "runs/mini", "--prompts", "none.txt") == 2
    said = capsys.readouterr()
    assert "is the small version (--mini) of d2g_sd_cfg3:gan" in said.err and "not run" in said.out


@pytest.mark.long
def test_a_run_that_a_recipe_names_is_trained_before_it(tmp_path, monkeypatch, capsys):
    """GDD's row of a critic that begins as that of a GAN, which is a row, trained once whatever the table's seeds."""
    monkeypatch.chdir(tmp_path)
    found = table_members("mini_gdd", [], False, "runs")
    names = [one.name for one in found]
    assert names[0] == "gdd_digits_seed0" and names.count("gdd_digits_critic") == 1
    pretrained = found[names.index("gdd_digits_stylegan2_pretrained_seed1")]
    assert pretrained.reads == {Path("runs/gdd_digits_critic")} and pretrained.start is None
    assert names.index("gdd_digits_critic") < names.index("gdd_digits_stylegan2_pretrained_seed0")
    with pytest.raises(SystemExit) as done:
        main(["train", "--table", "gdd_table1a", "--mini", "--plan"])
    assert done.value.code == 0 and "would start: nothing is missing" in capsys.readouterr().out
    small = 'eval: "null", preview: "null"'
    Path("two.yaml").write_text(f"""
title: A critic that begins as that of a GAN
paper: none
rows:
  - name: GDD
    x: runs/gdd
    recipe: "gdd_digits:stylegan2_pretrained"
    set: {{images: 16, gdd.critic.pretrained: runs/gan, {small}}}
  - name: GAN
    x: runs/gan
    recipe: "spi_gan_digits:k1"
    set: {{images: 32, spi_gan.critic.time: none, {small}}}
""")
    with pytest.raises(SystemExit) as done:
        main(["train", "--table", "two.yaml", "--set", "data.licence=CC-BY-4.0"])
    said = capsys.readouterr()
    assert done.value.code == 0 and said.err.index("--- gan (1 of 2)") < said.err.index("--- gdd (2 of 2)")
    with pytest.raises(SystemExit) as done:  # elsewhere, the critic is that of the run there
        main(["train", "--table", "two.yaml", "--set", "data.licence=CC-BY-4.0", "--out", "there"])
    said = capsys.readouterr()
    assert done.value.code == 0 and said.err.index("--- gan (1 of 2)") < said.err.index("--- gdd (2 of 2)")
    assert "pretrained: there/gan" in Path("there/gdd/recipe.yaml").read_text()
