"""The command lines in the heads of recipes: their recipes, variants, runs, options and protocols exist."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator

import pytest
import typer

from d2o.cli.app import app
from d2o.evaluation.paper_protocols import PRESETS
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.load import load_recipe
from d2o.shipped import recipe_folders

FILES = sorted(recipe_folders()[0].glob("*.yaml"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def head_of(text: str) -> str:
    return "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command behind `d2o` in a head: of whole lines, and those named behind them."""
    for line in re.findall(r"^# {3}((?:torchrun .*-m )?d2o .*)$", head_of(text), re.MULTILINE):
        line, _, remark = line.partition(" # ")
        yield shlex.split(line.partition("d2o ")[2])
        yield from (shlex.split(also) for also in re.findall(r"also: d2o (.*)", remark))


@pytest.fixture(scope="module")
def runs() -> set[str]:
    return {load_recipe(name).name for name in recipe_names()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_of_a_head_can_be_typed(path, runs):
    found = list(commands(path.read_text(encoding="utf-8")))
    assert any(words[0] in ("train", "finetune") for words in found)
    for name, *words in found:
        given = COMMANDS[name].make_context(name, list(words)).params  # what is unknown or missing is refused
        if name in ("train", "finetune"):
            swept = re.findall(r"variant=([^\s]+)", " ".join(given["sweep"]))
            for variant in swept[0].split(",") if swept else given["variant"] or [None]:
                recipe = given["recipe"] if variant is None else f"{given['recipe']}:{variant}"
                load_recipe(recipe, given["set_"], given["mini"])
                assert name == "train" or find_recipe(recipe).path.name == path.name
        for run in re.findall(r"runs/([^/\s]+)", " ".join(words)):
            assert run.removesuffix("-mini") in runs or "--out" in words or run == "pairs", run
        assert given.get("protocol") in (None, *PRESETS)


def test_a_head_says_what_it_takes():
    for path in FILES:
        head = head_of(path.read_text(encoding="utf-8")).lower()
        words = [word for word in ("data", "disk", "memory", "cost") if word not in head]
        assert not words, (path.name, words)
