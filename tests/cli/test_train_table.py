"""`d2o train --table`: what a table's rows need is trained once, in order, with each seed, and measured as one row."""

import json
import statistics
from pathlib import Path

import pytest

from d2o.cli.app import main
from tests.helpers import tiny_recipe

RECIPE = """
name: test
method: ode
teacher: {teacher}
pairs: {{path: {pairs}, n: 32, solver: euler, steps: 2, batch: 32, shard_size: 32}}
ode: {{loss: mse}}
optim: {{lr: 1.0e-3}}
batch: 16
images: 32
threads: 1
mini: {{images: 16}}
variants:
  more: {{images: 16}}
"""
TABLE = """
title: A small table
paper: none
against: real:digits
options: {{n: 20, metrics: [fd@digits], batch: 20, distance_n: 4}}
seeds: [3, 4]
rows:
  - {{name: more, x: runs/more, recipe: "{recipe}:more", start: runs/first}}
  - {{name: first, x: runs/first, recipe: "{recipe}"}}
  - {{name: first again, x: runs/first, recipe: "{recipe}"}}
  - {{name: quoted, paper: {{fd: 1.5}}}}
orders:
  - {{claim: again is equal, better: first again, than: first, by: fd}}
  - {{claim: quotes are no measurements, better: quoted, than: first, by: fd}}
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    recipe = tiny_recipe(tmp_path, RECIPE)
    path = tmp_path / "small.yaml"
    path.write_text(TABLE.format(recipe=recipe))
    monkeypatch.chdir(tmp_path)
    return path


def d2o(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


@pytest.mark.long
def test_a_table_is_trained_and_measured(table, capsys):
    assert d2o("train", "--table", table, "--out", "here") == 0
    said = capsys.readouterr()
    assert "all 4 runs are finished" in said.err and "together:" in said.out
    trained = sorted(path.parent.name for path in Path("here").glob("*/metrics.jsonl"))
    assert trained == ["first_seed3", "first_seed4", "more_seed3", "more_seed4"]
    assert "seed: 4" in Path("here/more_seed4/recipe.yaml").read_text()

    assert d2o("train", "--table", table, "--out", "here") == 0  # nothing is left to do
    assert capsys.readouterr().err.count("is finished") == 4

    assert d2o("eval", "--table", table, "--runs", "here", "--json", "results.json") == 0
    more, first, again, quoted = json.loads(Path("results.json").read_text())
    fd = more["metrics"]["fd@digits"]
    assert len(set(fd["runs"])) == 2 and fd["value"] == pytest.approx(statistics.fmean(fd["runs"]))
    assert fd["std"] == pytest.approx(statistics.stdev(fd["runs"]))
    assert [made["source"] for made in more["x"]["seeds"]] == ["here/more_seed3", "here/more_seed4"]
    assert first["metrics"]["fd@digits"] == again["metrics"]["fd@digits"] != fd
    said = capsys.readouterr().out
    assert quoted["paper"] == {"fd": 1.5} and "trainings with other seeds" in said
    assert "again is equal: not decided (fd " in said and "gain 0 ± 0, 0 of 2 seeds)" in said and "quotes" not in said


@pytest.mark.long
def test_a_seed_that_is_not_here_yet_is_said(table, capsys):
    assert d2o("train", "--table", table, "--mini") == 0
    assert Path("runs/mini/first_seed3").is_dir()
    Path("runs/mini/first_seed4").rename("elsewhere")
    capsys.readouterr()
    assert d2o("eval", "--table", table, "--runs", "runs/mini") == 0
    assert "first: 1 of 2 seeds are here" in capsys.readouterr().err


def test_the_cost_is_said_first(table, capsys):
    assert d2o("train", "--table", table, "--plan") == 0
    plan = capsys.readouterr().out
    assert "4 runs" in plan and not Path("runs").exists()
    # 64 calls for 32 pairs in two steps, which are made once, and one for each of 2 x 32 + 2 x 16 images
    assert "together: 160 network calls" in plan and "would start" in plan


def test_what_cannot_be_trained_is_refused(table, capsys):
    assert d2o("train") == 2 and "Give a recipe, or --table" in capsys.readouterr().err
    assert d2o("train", "quickstart", "--table", table) == 2
    assert "a recipe is too much" in capsys.readouterr().err
    assert d2o("train", "--table", "spi_gan_table0") == 2 and "unknown table" in capsys.readouterr().err
    assert d2o("eval", "quickstart", "--runs", "there") == 2 and "--table" in capsys.readouterr().err
    text = table.read_text()
    table.write_text(text.replace("name: first, x: runs/first,", "name: first, x: runs/first, start: runs/more,"))
    assert d2o("train", "--table", table, "--plan") == 2 and "begin from one another" in capsys.readouterr().err
    table.write_text(text.replace("[3, 4]", "[3, 3]"))
    assert d2o("train", "--table", table) == 2 and "twice" in capsys.readouterr().err
