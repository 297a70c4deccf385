"""Tables of papers as files: the shipped ones hold, and what is wrong in one's own is said with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.evaluation.judges import JUDGES
from d2o.evaluation.known_metrics import parse_metrics
from d2o.evaluation.paper_protocols import PRESETS
from d2o.evaluation.presets import apply_preset
from d2o.evaluation.protocol import Settings
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.layers import read_recipe
from d2o.reports.paper_tables import PRINTED, absent, find_table, load_table, table_names
from d2o.settings.recipe_names import is_shipped
from d2o.settings.yaml_text import Problems
from d2o.shipped import table_folders
from d2o.teachers.registry import teacher_names

HEAD = "title: t\npaper: p\n"


def run_name(recipe: str) -> str:
    """What a row's recipe calls its run; the recipe's own name where it does not ship yet."""
    if not is_shipped(recipe):
        return recipe.replace(":", "_")
    return read_recipe(find_recipe(recipe), Problems()).value["name"].value


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_table(path)
    return [line.replace(f"{path}:", "") for line in caught.value.message.splitlines()]


# ---- the shipped ones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", table_names())
def test_every_table_loads_names_what_exists_and_says_how_to_run_it(name):
    table, file = load_table(name), find_table(name)
    head = file.read_text().split("title:")[0]
    assert f"d2o eval --table {name}" in head and all(line.startswith("#") for line in head.splitlines())
    assert table.protocol in PRESETS or table.protocol is None
    measured = [row for row in table.rows if row.x]
    assert measured or name == "gdd_fig3"  # plots of a teacher's layers: nothing is scored
    for row in measured:
        run = row.x.startswith("runs/")
        images = row.x == "cifar10-test.zip"  # the reader's own
        assert run or images or row.x in (*teacher_names(), *JUDGES), row.x
        written = run and (row.set or row.x == f"runs/{run_name(row.recipe)}")  # where `d2o train` writes it
        assert not run or written, row.name
        options = table.options_of(row)
        if table.protocol:
            preset = PRESETS[table.protocol]
            options = apply_preset(preset, options | dict.fromkeys(preset.needs, "given"))
        Settings(**{key: value for key, value in options.items() if key in Settings.__dataclass_fields__})
    if table.protocol:  # every printed number is one that the protocol measures, so the columns meet
        keys = {key for row in table.rows for key in row.paper} - {*PRINTED}
        keys -= {"top1"} if name == "d2g_elatentlpips" else set()  # of its classifiers, quoted beside the distances
        wants = table.options_of(table.rows[0]).get("metrics") or PRESETS[table.protocol].metrics
        assert keys <= {want.key(key) for want in parse_metrics(wants) for key in want.metric.keys}


def test_students_without_classes_are_not_compared_with_the_teacher_s_images_of_classes():
    """`teacher` alone asks for images of the same noises and conditions; with `teacher_seed` they may be of others."""
    found = 0
    for table in map(load_table, table_names()):
        for row in table.rows:
            options = table.options_of(row)
            if row.recipe and is_shipped(row.recipe) and row.recipe.startswith(("spi_gan", "dd_gan")):
                assert "teacher" not in options or "teacher_seed" in options, row.name
                found += "teacher" in options
    assert found == 3  # two of mini_methods, one of mini_gdd


def test_the_papers_all_have_their_tables():
    papers = [f"sida_table{i}" for i in ("1", "2", "3", "3_pr", "4", "5", "6", "7", "8")]
    papers += [f"sida_fig{i}" for i in ("1", "2", "3a", "3b", "3c", "4", "5a", "5b")]
    papers += [f"spi_gan_table{i}" for i in range(1, 9)] + [f"spi_gan_fig{i}" for i in (3, 8, 9, 10, 11)]
    papers += [f"d2g_table{i}" for i in ("1", "1_pr", "2", "2_pr", "3", "4", "5", "6", "7")]
    papers += [f"d2g_table_a{i}" for i in ("1", "2", "3", "4", "4_pr")] + ["d2g_fig4", "d2g_fig5"]
    papers += ["d2g_appendix_d", "d2g_lambda_gan", "d2g_elatentlpips", "d2g_mini", "d2g_mini_lite0"]
    gdd = [f"gdd_table{i}" for i in ("1a", "1b", "2", "3a", "3a_cond", "3b", "3c", "4", "4_pr", "5", "6")]
    gdd += [f"gdd_fig{i}" for i in ("2a", "2b", "3", "4a", "4b")] + ["mini_gdd", "mini_gdd_fig2", "cifar16"]
    assert {*papers, *gdd, "spi_gan_dd_gan", "digits"} <= set(table_names())


def test_some_numbers_of_the_papers():
    """The records that the papers claim, read by hand from their abstracts and texts."""
    rows = {row.name: row for row in load_table("sida_table1").rows}
    assert rows["SiD2A, alpha 1.0"].printed("fid") == (1.499, 0.012) and rows["EDM (VP), the teacher"].printed(
        "fid"
    ) == (1.97, None)
    rows = {row.name: row for row in load_table("sida_table2").rows}
    assert rows["SiD2A, alpha 1.2"].printed("fid") == (1.396, 0.014)
    assert {row.name: row for row in load_table("sida_table3").rows}["SiD2A, alpha 1.2"].printed("fid") == (
        1.110,
        0.018,
    )
    assert {row.name: row for row in load_table("sida_table4").rows}["SiDA-XL"].printed("fid") == (1.449, 0.033)
    assert {row.name: row for row in load_table("gdd_table3c").rows}["GDD-I"].printed("fid") == (0.85, None)
    assert {row.name: row for row in load_table("d2g_table3").rows}["Diffusion2GAN"].printed("fid-clean") == (
        9.29,
        None,
    )
    assert {row.name: row for row in load_table("spi_gan_table2").rows}["SPI-GAN"].printed("fid-pytorch") == (
        6.62,
        None,
    )


def test_recipes_of_the_tables_can_be_trained():
    """tests/recipes/test_shipped.py plans every one of `recipe_names`."""
    named = {row.recipe for name in table_names() for row in load_table(name).rows if row.recipe}
    assert named <= set(recipe_names())


def test_what_diffusion2gan_prints_beside_its_scores():
    """The sheet's section F, as the files have it."""
    tables = {i: {row.name: row for row in load_table(f"d2g_table{i}").rows} for i in ("1", "2", "3", "6", "7", "_a4")}
    assert [row.paper.get("images_per_s") for row in tables["1"].values()] == [
        40.0,
        138.4,
        None,
        144.2,
        139.9,
        127.5,
        128.0,
    ]
    assert [row.about["space"] for row in tables["1"].values()] == ["pixel", *["latent"] * 6]
    assert tables["1"]["E-LatentLPIPS, batch 2048"].paper["batch"] == 2048 and not tables["1"]["L1"].paper
    cited = tables["2"]["+ GigaGAN's discriminator"]
    assert cited.cited and cited.recipe is None and cited.printed("fid-clean") == (13.97, None)
    assert tables["3"]["Imagen"].paper["parameters"] == 3e9 and tables["3"]["GigaGAN"].about == {"type": "GAN"}
    assert [row.paper["nfe_total"] / 1e6 for row in tables["6"].values()] == [819.2, 78.6, 80.3, 83.8, 94.3, 111.8]
    assert tables["7"]["ODE distillation, stage 1 alone"].printed("fid-clean") == (15.94, None)
    assert [row.paper["a100_days"] for row in tables["_a4"].values()] == [4783.0, 43.6]
    assert load_table("d2g_table_a1").rows[1].printed("fid-clean") == (13.39, None)
    assert [row.about for row in load_table("d2g_appendix_d").rows][1:] == [{"FID, paper": "> 200"}] * 2
    assert [row.paper["top1"] for row in load_table("d2g_table_a2").rows] == [0.7159, 0.7336, 0.6425, 0.6826]
    assert load_table("d2g_table_a3").rows[1].paper == {
        "2afc-traditional": 0.7429,
        "2afc-cnn": 0.8199,
        "2afc-real": 0.6321,
    }


def test_tables_are_not_taken_for_recipes():
    assert not set(table_names()) & set(recipe_names())
    assert all(folder.name == "tables" and folder.parent.name in ("recipes", "builtin") for folder in table_folders())


def test_digits_can_be_measured_here_and_says_what_makes_the_rest(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no run is
    table = load_table("recipes/tables/digits.yaml")
    teacher, once, quickstart = table.rows[:3]
    assert absent(teacher) is None and table.options_of(once) == {"n": 4000, "solver": "euler", "steps": 1}
    assert table.against_of(teacher) == "real:digits"
    assert absent(quickstart) == "runs/quickstart is not here; d2o train recipes/quickstart.yaml makes it"
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    assert absent(quickstart) is None


def test_absent_rows(tmp_path):
    rows = [
        "{name: a, x: nowhere/a}",
        "{name: b, x: nowhere/b, recipe: quickstart, start: runs/a}",
        "{name: c, x: nowhere/c, recipe: no_such}",
        "{name: d, paper: {fid: 1}}",
        "{name: e, x: edm-cifar10-cond-vp}",
        "{name: f, x: 'real:digits/a'}",
    ]
    text = HEAD + "rows:\n" + "".join(f"  - {row}\n" for row in rows)
    table = load_table(write(tmp_path / "t.yaml", text))
    assert [absent(row) for row in table.rows] == [
        "nowhere/a is not here",
        "nowhere/b is not here; d2o finetune recipes/quickstart.yaml --from runs/a makes it",
        "nowhere/c is not here, and this d2o has no recipe no_such that makes it",
        None,
        None,
        None,
    ]


# ---- one's own -------------------------------------------------------------------------------------------------------


def test_options_of_a_row_go_over_those_of_the_table(tmp_path):
    text = (
        HEAD
        + "options: {n: 200, metrics: [fd, pr], seed: 3}\nagainst: real.zip\nrows:\n  - {name: a, x: digits, options:"
        " {n: 100}, paper: {fd: 1, precision: [0.5, 0.1]}}\n  - {name: b, x: digits, against: other.zip}\n"
    )
    table = load_table(write(tmp_path / "mine.yaml", text))
    a, b = table.rows
    assert table.options_of(a) == {
        "n": 100,
        "metrics": ["fd", "pr"],
        "seed": 3,
    }  # only what is written; nothing is filled in
    assert (table.against_of(a), table.against_of(b)) == ("real.zip", "other.zip")
    assert a.printed("fd") == (1.0, None) and a.printed("precision") == (0.5, 0.1) and a.printed("recall") is None


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            "rows:\n  - {name: a, y: digits}\n",
            ["4: rows[0].y: unknown key; known here: name, x, options, paper, about, against, recipe, set, "],
        ),
        ("rows:\n  - {x: digits}\n", ["4: rows[0].name: missing; expected a text, not empty"]),
        ("rows: []\n", ["3: rows: expected a list, each a section (lines of `key: value`), got 0 values"]),
        ("", ["1: rows: missing; expected a list, each a section (lines of `key: value`)"]),
        (
            "rows:\n  - name: a\n    x: digits\n    options:\n      steps: fast\n",
            ["7: rows[0].options.steps: expected an integer, got 'fast'"],
        ),
        (
            "rows:\n  - name: a\n    x: digits\n    options:\n      stepz: 3\n",
            ["7: rows[0].options.stepz: unknown key; did you mean 'steps'?"],
        ),
        ("options: {n: 1}\nrows:\n  - {name: a, x: digits}\n", ["3: options: --n must be at least 2, not 1"]),
        (
            "protocol: sida_cifar\nrows:\n  - {name: a, x: digits}\n",
            ["3: protocol: unknown protocol 'sida_cifar': did you mean 'sida_cifar10'?"],
        ),
        (
            "rows:\n  - {name: a}\n",
            ["4: rows[0]: neither x nor paper: there is nothing to measure and nothing to quote"],
        ),
        (
            "rows:\n  - {name: a, x: b, cited: because}\n",
            ["4: rows[0].cited: the row is measured: it has x or a recipe"],
        ),
        ("rows:\n  - {name: a, x: b}\n  - {name: a, x: c}\n", ["5: rows[1].name: another row is called 'a', too"]),
        (
            "rows:\n  - name: a\n    paper:\n      fidd: 1.2\n",
            ["6: rows[0].paper.fidd: unknown number 'fidd': did you mean 'fid'?"],
        ),
        ("rows:\n  - name: a\n    paper: {fid: [1.2]}\n", ["5: rows[0].paper.fid: expected a number or a list"]),
        (
            "options: {metrics: [fidd]}\nrows:\n  - {name: a, x: b}\n",
            ["3: options: unknown metric 'fidd': did you mean 'fid'?"],
        ),
        (
            "protocol: gdd_ffhq64\nrows:\n  - {name: a, x: b, options: {n: 500, metrics: [kid]}}\n",
            [
                "5: rows[0].options: --metrics kid is not the protocol gdd_ffhq64",
                "5: rows[0].options: --n 500 is not the protocol gdd_ffhq64 (n 50000)",
            ],
        ),
        ("rows:\n  - {name: a, x: b, x: c}\n", ["4: rows.x: given twice (first in line 4)"]),
        ("title: again\nrows:\n  - {name: a, x: b}\n", ["3: title: given twice (first in line 1)"]),
        ("rows: &a []\nagainst: *a\n", ["4: aliases are not used in tables; write the value out"]),
    ],
)
def test_what_is_wrong_is_said_with_line_and_key(text, problems, tmp_path):
    found = refused(write(tmp_path / "t.yaml", HEAD + text))
    assert len(found) == len(problems), found
    for line, start in zip(found, problems):
        assert line.startswith(start), line


def test_all_problems_at_once(tmp_path):
    text = HEAD + "protocol: nope\nrows:\n  - {name: a, paper: {fid: 1, nonsense: 2}}\n  - {name: b}\n"
    assert [line.split(":")[0] for line in refused(write(tmp_path / "t.yaml", text))] == ["3", "5", "6"]


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "is not a table"), (b"- a\n", "is not a table"), (b"\xff\xfe\x00", "is not a table: it is not a text")],
)
def test_files_that_are_no_tables(data, words, tmp_path):
    (tmp_path / "t.yaml").write_bytes(data)
    with pytest.raises(UserError, match=words):
        load_table(tmp_path / "t.yaml")


def test_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_table("digits") == find_table("tables/digits") == find_table("recipes/tables/digits.yaml")
    with pytest.raises(UserError) as caught:
        load_table("sida_table11")
    assert caught.value.message == "unknown table 'sida_table11': did you mean 'sida_table1'?"
    with pytest.raises(UserError, match="no such table file: 'x/digit.yaml'; did you mean 'digits'"):
        load_table("x/digit.yaml")
