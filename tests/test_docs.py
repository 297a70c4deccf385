"""README, CONTRIBUTING and docs against the code: commands, options, recipes and functions are there, links lead
somewhere, the Python runs, and what the site is made of is in it."""

import posixpath
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
import yaml

from d2o.cli.app import app
from d2o.methods.base import get_method, method_names
from d2o.recipes.find import find_recipe
from d2o.settings.recipe_names import renamed
from tools import doc_commands, site_text

ROOT = Path(__file__).parents[1]
PAGES = doc_commands.pages()
COMMANDS = typer.main.get_command(app).commands
ADDED = "recipes/ode_online_digits.yaml"  # what CONTRIBUTING.md adds
FLAGS = ("--quiet", "--debug", "--trust")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def in_text(page: Path) -> list[list[str]]:
    """Commands in the text, without `d2o`."""
    return [shlex.split(line)[1:] for line in re.findall(r"`(d2o (?!-)[^`\n]*)`", page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_options_and_recipes_are_those_of_today(page):
    for line in [*(list(one.words) for one in doc_commands.shown(page)), *in_text(page)]:
        words = [word for word in line if word not in FLAGS]
        if not words or words[0].startswith("-") or words[0].isupper():
            continue
        command = COMMANDS[words[0]]
        if words[0] == "recipes" and len(words) > 1 and not words[1].startswith("-"):
            command = command.commands[words[1]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[1:]:
            if re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in known, line
        if words[0] in ("train", "finetune") and len(words) > 1 and not re.match(r"-|[A-Z]|\.\.\.|mine", words[1]):
            recipe = words[1].replace("...", "")
            assert renamed(recipe) is None, f"{line}: the name of the release before"
            assert recipe == ADDED or find_recipe(recipe).path.exists(), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_blocks_are_read_by_the_command_line(page):
    """With all values: numbers are numbers, arguments that have to be given are."""
    for one in doc_commands.shown(page):
        words = [word for word in one.words if word not in FLAGS]
        if doc_commands.placeholder(one) or words[0] not in COMMANDS:
            continue
        command, rest = COMMANDS[words[0]], words[1:]
        if rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(one.line, list(rest))


def test_commands_are_found_marked_and_made_small():
    found = {name_of(page): list(doc_commands.shown(page)) for page in PAGES}
    assert len(found["README.md"]) > 10 and len(found["docs/methods/sid.md"]) == 7
    (gpu,) = (one for one in found["docs/start.md"] if one.line == "d2o train sid_cifar10:cond_a1.2")
    assert gpu.mark == "GPU"
    first = found["README.md"][2]
    assert first.mark == "" and doc_commands.in_small(first)[:5] == [*first.words, "--mini", "--set", "images=128"]
    assert doc_commands.run_of("recipes/ode_digits.yaml") == "ode_digits"
    assert doc_commands.run_of("d2g_digits:gan") == "d2g_digits_gan"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_functions_are_importable(page):
    for name in sorted(set(re.findall(r"`(d2o(?:\.\w+)+)`", page.read_text(encoding="utf-8")))):
        assert found(name), f"{name_of(page)}: {name}"


def found(name: str) -> bool:
    """Whether it is a module, or something in one."""
    head, *rest = name.split(".")
    there: object = import_module(head)
    for i, part in enumerate(rest):
        try:
            there = getattr(there, part) if hasattr(there, part) else import_module(".".join([head, *rest[: i + 1]]))
        except ImportError:
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_of_the_repository(page):
    text = doc_commands.FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", text):
        target = posixpath.normpath(posixpath.join(name_of(page.parent), link))
        assert (ROOT / target).exists(), f"{name_of(page)}: {link}"


def test_every_page_is_in_the_navigation_and_every_method_on_a_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    parts = [part for entry in nav for part in entry.values()]
    named = {page for part in parts for page in ([part] if isinstance(part, str) else part)}
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert pages | {"index.md", "contributing.md", "changelog.md"} == named
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "methods")
    taught = [name for name in method_names() if get_method(name).takes or "gan" in name]
    assert not [name for name in taught if f"<!-- switches: {name} -->" not in text]
    assert not [name for name in taught if f"<!-- recipes: {name} -->" not in text]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    rows = text[text.index("<!-- results") : text.index("<!-- end of results")].count("\n| ") - 2
    assert 1 <= rows <= 8 and text.count("![") == 1


@pytest.mark.long
def test_the_sites_keys_are_those_of_the_code():
    keys = site_text.all_keys()
    assert "| `sid.alpha` | weight of the squared difference of the scores" in keys and "| 1.2 |" in keys
    assert all(f"## `{name.replace('-', '_')}:`" in keys for name in method_names())
    assert site_text.escaped("a `b_c` of d_e <f>") == r"a `b_c` of d\_e &lt;f>"


@pytest.mark.long
def test_the_sites_recipes_and_teachers_are_those_that_ship():
    assert "| `sid_cifar10:cond_a1.2` |" in site_text.recipes("sid")
    assert "| `tiny-sd` | ships with d2o |" in site_text.teachers() and "/LICENSE.md)" in site_text.teachers()


def test_the_sites_commands_are_those_of_the_command_line():
    commands = site_text.commands()
    assert all(f"## d2o {name}\n" in commands for name in COMMANDS) and "### d2o recipes explain" in commands
    assert "| `--n`, `-n` | Generated images" in commands


def test_every_module_has_a_place_in_the_sites_api():
    pages = dict(site_text.api_pages())
    assert "::: d2o.losses.score" in pages["api/d2o-losses.md"] and "::: d2o.condition" in pages["api/d2o-condition.md"]


def test_links_and_equations_of_the_site():
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    pages = import_module("tools.site_pages")
    assert pages.relinked("../../benchmarks/results/style.json", "docs/methods", "methods/spi-gan.md") == (
        "../files/benchmarks/results/style.json"
    )
    assert pages.relinked("docs/faq.md", "", "index.md") == "faq.md"
    assert pages.relinked("../CONTRIBUTING.md", "docs", "faq.md") == "contributing.md"
    html = pages.on_page_content(r'<p><span class="arithmatex">\(a &lt; b\)</span></p>', None, None, None)
    assert re.search(r"<math .*<mi>a</mi><mo>&#x0003C;</mo><mi>b</mi>", html) and "\\(" not in html


def test_text_teachers_in_python():
    text = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict = {}
    exec(code.replace("cfg=3.0", "cfg=3.0, steps=2"), scope)
    assert scope["images"].shape == (2, 3, 32, 32) and torch.isfinite(scope["images"]).all()
