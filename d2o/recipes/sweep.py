"""A recipe trained several times with other values of some keys: `d2o train RECIPE --sweep alpha=0,0.5,1 --sweep
optim.lr=1e-4,2e-4`, or as some of its variants: `--sweep variant=mse,l1`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2o.errors import UserError, nearest
from d2o.interop.outputs import check_output
from d2o.recipes.find import find_recipe
from d2o.recipes.former import FORMER, KINDS
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe, section_key, shape_of
from d2o.settings.recipe_names import line_of
from d2o.settings.wording import dotted, is_section

VARIANT = "variant"
"""In place of a key: the recipe's variants are the values."""


@dataclass(frozen=True)
class Axis:
    """A key with the values it takes, as they were written. `key`: in the whole recipe; `name`: short, for people."""

    key: str
    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """One run of a sweep. `name` ("alpha=1.2") is also its folder; `settings`: key in the whole recipe -> value;
    `source`: the recipe as a command line names it."""

    name: str
    settings: Mapping[str, object]
    recipe: Recipe
    source: str


@dataclass(frozen=True)
class Sweep:
    """`base` is the recipe without the sweep; of variants the first one. `name` and `title` are those of them all."""

    base: Recipe
    axes: tuple[Axis, ...]
    members: tuple[Member, ...]
    name: str
    title: str

    @property
    def folder(self) -> str:
        """Where it goes if the user does not say, under runs."""
        return "-".join([self.name, "sweep", *(_clean(axis.name) for axis in self.axes)])

    @property
    def of_variants(self) -> bool:
        return any(axis.key == VARIANT for axis in self.axes)


def plan_sweep(name: str, overrides: Sequence[str], sweeps: Sequence[str], mini: bool = False) -> Sweep:
    """Every combination of the values, each a checked recipe. UserError: all that is wrong with keys and values, a line
    each."""
    variants = _variants(name, sweeps)
    base = load_recipe(_source(name, variants[0] if variants else None), overrides, mini)
    axes = tuple(
        Axis(VARIANT, VARIANT, variants) if text.partition("=")[0].strip() == VARIANT else _axis(text, base.method)
        for text in sweeps
    )
    if twice := next((axis.key for i, axis in enumerate(axes) if axis.key in [other.key for other in axes[:i]]), None):
        raise UserError(f"--sweep {twice}: given twice", "give all its values in one --sweep")
    members, lines, hint = [], dict[str, None](), ""
    for values in itertools.product(*(axis.values for axis in axes)):
        given = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        source = _source(name, given.get(VARIANT))
        changes = [f"{key}={value}" for key, value in given.items() if key != VARIANT]
        try:
            recipe = load_recipe(source, overrides, mini, changes)
        except UserError as error:
            lines |= dict.fromkeys(error.message.splitlines())
            hint = hint or error.hint
            continue
        settings = {key: given[key] if key == VARIANT else value_at(recipe.resolved(), key) for key in given}
        label = ",".join(f"{_clean(axis.name)}={written(settings[axis.key])}" for axis in axes)
        members.append(Member(label, settings, recipe, source))
    if lines:
        raise UserError("\n".join(lines), hint)
    for i, member in enumerate(members):
        if any(member.name == other.name for other in members[:i]):
            raise UserError(f"--sweep: {member.name} is there twice", "give each value once")
    title = base.title or base.name
    if not variants:
        return Sweep(base, axes, tuple(members), base.name, title)
    path = find_recipe(name).path
    text = path.read_text(encoding="utf-8")
    called = line_of(text, "name") or path.stem
    return Sweep(base, axes, tuple(members), called, line_of(text, "title") or called)


def _variants(name: str, sweeps: Sequence[str]) -> tuple[str, ...]:
    """The values of `variant=a,b,c`, if it is there. UserError: none is given, or the recipe is one already."""
    for text in sweeps:
        key, _, rest = text.partition("=")
        if key.strip() != VARIANT:
            continue
        if (already := find_recipe(name).variant) is not None:
            raise UserError(f"--sweep {VARIANT}: {name} is the variant {already} already", "name the recipe alone")
        values = split_values(rest)
        if not all(values):
            raise UserError(f"--sweep {VARIANT}: expected {VARIANT}=NAME,NAME,...", "`d2o recipes` lists variants")
        return tuple(values)
    return ()


def _source(name: str, variant: str | None) -> str:
    return name if variant is None else f"{name}:{variant}"


def _axis(text: str, method: str) -> Axis:
    """`key=a,b,c`; the key is one of the recipe, or of the method's own section."""
    name, equals, rest = text.partition("=")
    name = name.strip()
    where = f"--sweep {name or text}"
    if not equals or not name:
        raise UserError(f"{where}: expected key=value,value,..., for example optim.lr=1e-4,2e-4")
    shape, own = shape_of(method), section_key(method)
    path = tuple(name.split("."))
    if path[0] not in shape.keys(()) and path[0] in shape.keys((own,)):
        path = (own, *path)
    if path[0] == FORMER and own in KINDS:  # as the section was called
        path = (own, *path[1:])
    schema = shape.at(path)
    if schema is None:
        known = [dotted(p) for p in shape.paths()]
        near = nearest(name, [*known, *(key.removeprefix(f"{own}.") for key in known)])
        raise UserError(
            f"{where}: unknown key" + (f"; did you mean {near!r}?" if near else ""),
            f"a key of the recipe, or of its section `{own}` ({', '.join(shape.keys((own,)))})",
        )
    if schema and is_section(schema):
        raise UserError(f"{where}: a section; sweep one of its keys ({', '.join(shape.keys(path))})")
    values = split_values(rest)
    if not all(values):
        raise UserError(f"{where}: a value is missing in {rest!r}", "null stands for none")
    short = path[1:] if path[0] == own and len(path) > 1 else path
    return Axis(".".join(path), ".".join(short), tuple(values))


def split_values(text: str) -> list[str]:
    """At the commas that are not within brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not parts[-1].strip():
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def value_at(resolved: Mapping[str, object], key: str) -> object:
    """The value of a dotted key; None where its section is absent."""
    value: object = resolved
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def written(value: object) -> str:
    """A value as it stands in the name of a folder: the same for 1.2 and 1.20."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return "_".join(written(item) for item in value)
    return _clean(str(value))


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)


def check_folder(folder: Path) -> None:
    """UserError: the folder holds a run, or something foreign, or cannot be written."""
    check_output(folder, folder=True)
    if (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} holds a run, not a sweep", "choose another --out")
    if folder.exists() and any(folder.iterdir()) and not (folder / "sweep.json").exists():
        raise UserError(f"{folder} holds other files and no sweep", "choose another --out")
