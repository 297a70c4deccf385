"""From a recipe's name or file, with overrides, to a `Recipe`. Precedence: extended file < file < `mini:` (with --mini)
< --set.

Sections are merged key by key; lists and values are replaced. In a layer that changes another (a file with `extends`,
`mini:`, --set) null
takes a key back: to none where none is allowed, else to its default; in a free section (`network:`, `reproduces:`) it
removes the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from yaml.nodes import MappingNode, SequenceNode

from d2o.errors import UserError, nearest, unknown
from d2o.recipes.schema import LOADER_KEYS, Recipe, check, shape_of
from d2o.recipes.stores import fill_from_store
from d2o.settings.wording import KeyPath, Schema, child, dotted, is_free, is_section, may_be_null, members, show
from d2o.settings.yaml_text import Mark, Node, Problems, build, compose, read
from d2o.shipped import recipe_folders, shown

# ---- finding ---------------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Names of the recipes that come with d2o, sorted."""
    return sorted({path.stem for folder in recipe_folders() for path in folder.glob("*.yaml")})


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """The file of a recipe: a path as it is given; else one that comes with d2o, with or without `recipes/` and
    `.yaml`.

    UserError: a folder; no such recipe, with the nearest one and the list.
    """
    given = os.fspath(name)
    if os.path.exists(given) and not os.path.isdir(given):
        return Path(given)
    stem = given.removeprefix("recipes/").removesuffix(".yaml")
    is_name = bool(stem) and "/" not in stem
    for folder in recipe_folders() if is_name else []:
        if os.path.isfile(folder / f"{stem}.yaml"):
            return folder / f"{stem}.yaml"
    if given and os.path.isdir(given):
        inside = os.path.join(given, "recipe.yaml")
        raise UserError(
            f"{given} is a folder; expected a recipe (.yaml)",
            f"did you mean {inside}?" if os.path.isfile(inside) else "",
        )
    if is_name and (given == stem or given.startswith("recipes/")):
        raise unknown("recipe", stem, recipe_names())
    near = nearest(Path(stem).name, recipe_names())
    advice = f"; did you mean recipe {near!r}?" if near else ""
    raise UserError(f"no such recipe file: {given!r}{advice}", f"known recipes: {', '.join(recipe_names())}")


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, problems: Problems) -> Node:
    """The tree of one file. UserError: unreadable, or not YAML with keys at the top."""
    root = read(path, "recipe")
    where = shown(path)
    if root is None or (root.tag.endswith(":null") and not root.value):
        raise UserError(f"{where} is empty; a recipe has at least name, method, optim, batch and images")
    if not isinstance(root, MappingNode):
        got = "a list" if isinstance(root, SequenceNode) else "a text"
        raise UserError(f"{where}:{root.start_mark.line + 1}: not a recipe: expected lines of `key: value`, got {got}")
    extends = any(key.value == "extends" for key, _ in root.value)
    return build(root, Mark(where, line=1, overlay=extends), problems)


def _extended(root: Node, path: Path, problems: Problems) -> Node:
    """`root` merged over the recipe that it extends, if any."""
    extends = root.value.pop("extends", None)
    if extends is None or extends.value is None:
        return root
    where = f"{extends.mark.file}:{extends.mark.line}: extends"
    if not isinstance(extends.value, str) or not extends.value:
        raise UserError(f"{where}: expected the path or name of one recipe, got {show(extends.value)}")
    beside = [path.parent / extends.value, path.parent / f"{extends.value}.yaml"]
    found = next((candidate for candidate in beside if os.path.isfile(candidate)), None)
    try:
        found = found or find_recipe(extends.value)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint) from error
    if os.path.samefile(found, path):
        raise UserError(f"{where}: {extends.value} is this file itself")
    base = _read(found, problems)
    if "extends" in base.value:
        raise UserError(
            f"{where}: {extends.value} itself extends {show(base.value['extends'].value)}; only one level is allowed"
        )
    return Node(merge(_relicensed(base, [root]), root).value, root.mark)


def _override(text: str, problems: Problems, flag: str = "--set") -> Node | None:
    """`a.b=value` as a tree; the value is read as YAML, nothing is null. `flag`: how it was given."""
    key, equals, written = text.partition("=")
    key = key.strip()
    mark = Mark(f"{flag} {key or text}")
    parts = key.split(".")
    if not equals or not all(parts):
        problems.add(mark, "expected key=value, for example optim.lr=1e-4")
        return None
    if parts[0] in ("extends", "mini"):
        problems.add(
            mark,
            "cannot be set; it belongs in the file"
            + (" (set the key itself: --set comes after mini)" if parts[0] == "mini" else ""),
        )
        return None
    try:
        node = compose(written, mark.file)
    except UserError as error:
        why = error.message.removeprefix(f"{mark.file}:").split(": ", 1)[-1]
        problems.add(mark, f"cannot read {show(written)}: {why} (put a text with special characters in quotes)")
        return None
    marks = [Mark(mark.file, 0, tuple(parts[:i]), overlay=True) for i in range(len(parts) + 1)]
    result = Node(None, marks[-1]) if node is None else build(node, marks[-1], problems)
    if node is None and written.strip():  # only a comment: `#x` was meant as a text
        result = Node(written.strip(), marks[-1])
    for part, above in zip(reversed(parts), reversed(marks[:-1])):
        result = Node({part: result}, above)
    return result


# ---- merging ---------------------------------------------------------------------------------------------------------


def merge(low: Node, high: Node) -> Node:
    """`high` over `low`: sections key by key, everything else replaced. Neither is changed. A section stays marked
    where it was begun."""
    if not isinstance(low.value, dict) or not isinstance(high.value, dict):
        return high
    merged = dict(low.value)
    for key, node in high.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, low.mark)


def _names_images(layer: Node, key: str = "path") -> Any:
    """What a layer says of `data.path`, or of another key of that section; None if nothing."""
    data = layer.value.get("data")
    return data.value[key].value if data is not None and isinstance(data.value, dict) and key in data.value else None


def _relicensed(low: Node, layers: Sequence[Node]) -> Node:
    """`low` without its `data.licence` where layers that will be merged over it name other images: those have a licence
    of their own."""
    paths = [path for layer in layers if (path := _names_images(layer)) is not None]
    if not paths or paths[-1] == _names_images(low) or _names_images(low, "licence") is None:
        return low
    data = low.value["data"]
    rest = {key: node for key, node in data.value.items() if key != "licence"}
    return Node({**low.value, "data": Node(rest, data.mark)}, low.mark)


def _settled(node: Node, schema: Schema | None) -> Any:
    """Plain data, without the keys that a null takes back to their default (see the top of this file)."""
    if not isinstance(node.value, dict):
        return node.value
    required = [key for member in members(schema or {}) for key in member.get("required", [])]
    plain = {}
    for key, inner in node.value.items():
        below = child(schema, key)
        if inner.value is None and below is not None and key not in required:
            if is_free(below):
                dropped = inner.mark.overlay
            else:
                dropped = not may_be_null(below) and (inner.mark.overlay or is_section(below))
            if dropped:
                continue
        plain[key] = _settled(inner, below)
    return plain


class _Placed(NamedTuple):
    """A problem with its place in the files."""

    mark: Mark
    path: KeyPath
    text: str

    def line(self) -> str:
        """With the key as it was written: in `mini:` with that in front; none where the mark says it, as `--set a.b`
        does."""
        depth = len(self.mark.path) - (self.mark.path[:1] == ("mini",))
        key = dotted((*self.mark.path, *self.path[depth:]))
        return self.text if not key or self.mark.file in (f"--set {key}", f"--sweep {key}") else f"{key}: {self.text}"


def _checked(root: Node, begun: Mapping[str, Any] | None) -> tuple[Recipe | None, list[_Placed]]:
    """The Recipe of a merged tree, or None and what is wrong with it."""
    method = root.value["method"].value if "method" in root.value else None
    recipe, problems = check(fill_from_store(_settled(root, shape_of(method).tree), begun))
    return recipe, [_Placed(_mark(root, path), path, text) for path, text in problems]


def _mark(root: Node, path: KeyPath) -> Mark:
    """Where a key was written, or the section that lacks it."""
    node = root
    for part in path:
        if not isinstance(node.value, dict) or part not in node.value:
            break
        node = node.value[part]
    return node.mark


def load_recipe(
    path_or_name: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    mini: bool = False,
    sweep: Sequence[str] = (),
    begun: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read, merge and check a recipe. `overrides`: `key=value` of --set; `mini`: apply the recipe's `mini:` section;
    `sweep`: `key=value` of --sweep, over all others. What `pairs:` leaves open is as the store at `pairs.path` says, or
    as in `begun`, the resolved recipe of a run that is continued.

    The `mini:` section is checked in any case. UserError: a line for everything that is wrong, with file, line, key and
    what was expected.
    """
    path, problems = find_recipe(path_or_name), Problems()
    root = _extended(_read(path, problems), path, problems)
    given = [*((text, "--set") for text in overrides), *((text, "--sweep") for text in sweep)]
    changes = [node for node in (_override(text, problems, flag) for text, flag in given) if node is not None]
    small = root.value.pop("mini", None)
    if small is not None and isinstance(small.value, dict):
        for key in [key for key in small.value if key in LOADER_KEYS]:
            problems.add(small.value.pop(key).mark, f"mini.{key}: cannot stand in `mini:`")
        small = _layer(small)
    elif small is not None and small.value is not None:
        problems.add(small.mark, f"mini: expected a section of recipe keys, got {show(small.value)}")
        small = None
    elif mini:
        raise UserError(f"{shown(path)} has no `mini:` section", "run it without --mini, or add one")
    else:
        small = None

    chosen = root if small is None or not mini else merge(_relicensed(root, [small]), small)
    chosen = _relicensed(chosen, changes)
    for change in changes:
        chosen = merge(chosen, change)
    unread = frozenset(problems.marks)  # no need to say more about what could not be read
    recipe, found = _checked(chosen, begun)
    for problem in found:
        if problem.mark not in unread:
            problems.add(problem.mark, problem.line())
    if small is not None and not mini:  # what --mini would stumble over
        alone = set(_checked(root, begun)[1])
        for problem in _checked(merge(_relicensed(root, [small]), small), begun)[1]:
            if problem not in alone and problem.mark not in unread:
                inside = problem.mark.path[:1] == ("mini",)
                problems.add(problem.mark, problem.line() + ("" if inside else " (with --mini)"))
    if problems or recipe is None:
        raise problems.error()
    return recipe


def _layer(small: Node) -> Node:
    """The `mini:` section as a layer over the recipe: its marks count as changes."""
    mark = replace(small.mark, overlay=True)
    return Node(
        {key: _layer(node) for key, node in small.value.items()} if isinstance(small.value, dict) else small.value, mark
    )


# ---- comparing -------------------------------------------------------------------------------------------------------


def diff_recipes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """How two resolved recipes differ, a line per key in a's order: `optim.lr: 0.001 -> 0.002`. A key that one lacks is
    `absent` there."""
    return _diff(a, b, ())


_ABSENT = object()


def _diff(a: Any, b: Any, path: tuple[str, ...]) -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = list(dict.fromkeys([*a, *b]))
        return [line for key in keys for line in _diff(a.get(key, _ABSENT), b.get(key, _ABSENT), (*path, str(key)))]
    return [] if _same(a, b) else [f"{'.'.join(path)}: {_written(a)} -> {_written(b)}"]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and (
        a == b or (a != a and b != b)
    )  # true is not 1; nan is itself


def _written(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    return (
        value if isinstance(value, str) and value and value == value.strip() else json.dumps(value, ensure_ascii=False)
    )
