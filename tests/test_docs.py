"""README, CONTRIBUTING and docs against the code: commands, options and recipes are there, the Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from d2o.cli.app import app
from d2o.recipes.find import find_recipe
from d2o.settings.recipe_names import renamed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
ADDED = "recipes/ode_online_digits.yaml"  # what CONTRIBUTING.md adds


def command_lines(page: Path) -> list[str]:
    """Lines of `d2o ...`, in blocks and in the text, without what stands before and behind the command."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    found = re.findall(r"^(?:torchrun .*? -m |srun |#   )?(d2o [^#\n]*)", blocks, re.MULTILINE)
    return [*found, *re.findall(r"`(d2o (?!-)[^`\n]*)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_recipes_are_those_of_today(page):
    for line in command_lines(page):
        words = [word for word in shlex.split(line)[1:] if word not in ("--quiet", "--debug", "--trust")]
        if not words or words[0].startswith("-") or words[0].isupper():
            continue
        command = COMMANDS[words[0]]
        if words[0] == "recipes" and len(words) > 1 and not words[1].startswith("-"):
            command = command.commands[words[1]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[1:]:
            if re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in known, line
        if words[0] in ("train", "finetune") and len(words) > 1 and not re.match(r"-|[A-Z]|\.\.\.", words[1]):
            recipe = words[1].replace("...", "")
            assert renamed(recipe) is None, f"{line}: the name of the release before"
            assert recipe == ADDED or find_recipe(recipe).path.exists(), line


def test_text_teachers_in_python():
    text = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict = {}
    exec(code.replace("cfg=3.0", "cfg=3.0, steps=2"), scope)
    assert scope["images"].shape == (2, 3, 32, 32) and torch.isfinite(scope["images"]).all()
