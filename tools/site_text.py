"""The parts of the documentation that are made of the code: keys of recipes, recipes, commands, teachers, API."""

from __future__ import annotations

import functools
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from d2o.interop import catalogue
from d2o.methods.base import method_names
from d2o.recipes.explain import Explanation, explanations
from d2o.recipes.listing import Entry, entries
from d2o.recipes.schema import section_key
from d2o.teachers.registry import teacher_names

API = {
    "d2o": "What `import d2o` gives.",
    "d2o.condition": "What samples are asked to be: nothing, classes, prompts.",
    "d2o.teachers": "Diffusion models that samples come from: denoisers, guidance, solvers, spaces.",
    "d2o.students": "Generators of one call, or of few.",
    "d2o.methods": "How a student is trained: one file a paper, and what methods have in common.",
    "d2o.losses": "Pure functions: an equation in one place.",
    "d2o.critics": "Networks that tell real images from made ones.",
    "d2o.features": "Frozen networks with taps.",
    "d2o.augment": "Augmentations with explicit random numbers.",
    "d2o.diffusion": "Schedules, processes, solvers.",
    "d2o.networks": "The networks, with the parameter names of published checkpoints.",
    "d2o.spaces": "Latent spaces.",
    "d2o.data": "Images, pair stores, prompts.",
    "d2o.metrics": "Metrics as maths: tensors in, numbers out.",
    "d2o.export": "Students in the formats of others.",
}
"""The packages of the API pages, in their order."""


MARKS = re.compile(r"([\\*_\[\]$#])")


def cell(text: object) -> str:
    """Text in a cell of a markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- keys ------------------------------------------------------------------------------------------------------------


@functools.cache
def known_keys() -> dict[str, list[Explanation]]:
    """`explanations`, which reads all recipes, once."""
    return explanations()


def switches(method: str) -> str:
    """The method's own section, as `d2o recipes explain` tells it."""
    return keys_table(known_keys()[method])


def keys_table(found: Iterable[Explanation]) -> str:
    return table(["key", "meaning", "expected", "default"], map(key_row, found))


def key_row(one: Explanation) -> list[str]:
    default = "has to be given" if one.default is None else one.default
    return [f"`{one.key}`", escaped(one.meaning), escaped(one.expected), escaped(default)]


def escaped(text: str) -> str:
    """Descriptions are plain text with code in backticks: what else markdown would read is not meant."""
    parts = text.split("`")
    even = len(parts) % 2 == 0  # a single backtick is one
    return "`".join(
        part if i % 2 and not even else MARKS.sub(r"\\\1", part).replace("<", "&lt;") for i, part in enumerate(parts)
    )


def all_keys() -> str:
    """Every key of every recipe, section by section, then the methods' own."""
    sections: dict[str, list[Explanation]] = {"": []}
    for one in known_keys()[""]:
        first, dot, _ = one.key.partition(".")
        sections.setdefault(first, []).append(one) if dot else sections[""].append(one)
    parts = [f"## Top level\n\n{keys_table(sections.pop(''))}"]
    parts += [f"## `{name}:`\n\n{keys_table(rows)}" for name, rows in sections.items()]
    for method in method_names():
        parts.append(f"## `{section_key(method)}:`\n\nOf `method: {method}`.\n\n{switches(method)}")
    return "\n\n".join(parts)


# ---- recipes, teachers -----------------------------------------------------------------------------------------------


def recipes(method: str | None = None) -> str:
    """The recipes that come with d2o: those of a method, or all, method by method."""
    by_method: dict[str, list[Entry]] = {}
    for entry in entries():
        by_method.setdefault(entry.method, []).append(entry)
    if method is not None:
        return recipe_table(by_method[method])
    return "\n\n".join(f"## {name}\n\n{recipe_table(rows)}" for name, rows in sorted(by_method.items()))


def recipe_table(rows: Iterable[Entry]) -> str:
    return table(["recipe", "what", "teacher", "learns from", "images", "reproduces"], map(recipe_row, rows))


def recipe_row(entry: Entry) -> list[str]:
    teacher = f"`{entry.teacher}`" if entry.teacher else ""
    images = f"{entry.images:,}" if entry.images else ""
    return [f"`{entry.name}`", escaped(entry.title), teacher, escaped(entry.data), images, escaped(entry.reproduces)]


def teachers() -> str:
    """Published teachers: size, usual sampling, licence."""
    rows = []
    for name in teacher_names():
        if (known := catalogue.find(name)) is None:
            rows.append([f"`{name}`", "ships with d2o", "", "", "CC-BY-4.0"])
            continue
        usual = f"{known.solver}, {known.steps} steps" + (f", cfg {known.cfg:g}" if known.cfg != 1 else "")
        licence = f"[{known.licence}]({known.licence_url})" if known.licence_url else known.licence
        rows.append([f"`{name}`", escaped(known.about), f"{known.parameters:,}", usual, licence])
    return table(["name", "what", "parameters", "usual sampling", "licence"], rows)


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its options, from the command line itself."""
    import typer

    from d2o.cli.app import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        parts.append(f"## d2o {name}\n\n{escaped(command.help or '')}\n\n{options(command)}")
        for sub, below in getattr(command, "commands", {}).items():
            parts.append(f"### d2o {name} {sub}\n\n{escaped(below.help or '')}\n\n{options(below)}")
    return "\n\n".join(parts)


def options(command: Any) -> str:
    rows = [option_row(one) for one in command.params if one.name != "help" and not getattr(one, "hidden", False)]
    return table(["option", "meaning", "default"], rows) if rows else "It has no options."


def option_row(one: Any) -> list[str]:
    names = [one.name] if one.param_type_name == "argument" else [*one.opts, *one.secondary_opts]
    shown = getattr(one, "show_default", False) and one.default not in (None, False, [], ())
    return ["`" + "`, `".join(names) + "`", escaped(one.help or ""), f"`{one.default}`" if shown else ""]


# ---- API -------------------------------------------------------------------------------------------------------------


def api_pages() -> Iterator[tuple[str, str]]:
    """(file, text): a page for each package, with all its modules."""
    for package, words in API.items():
        yield (
            f"api/{package.replace('.', '-')}.md",
            f"# {package}\n\n{words}\n\n" + "\n\n".join(f"## {module}\n\n::: {module}" for module in modules(package)),
        )


def modules(package: str) -> list[str]:
    """A package's modules, itself first; of `d2o` itself alone. Nothing is imported."""
    spec = find_spec(package)
    places = (spec and spec.submodule_search_locations) or []
    below = [f"{package}.{info.name}" for info in pkgutil.iter_modules(places) if not info.name.startswith("_")]
    return [package] if package == "d2o" else below or [package]
