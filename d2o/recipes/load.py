"""From a recipe's name or file, with overrides, to a `Recipe`. Precedence: extended recipe < file < variant < `mini:`
(with --mini) < --set.

Sections are merged key by key; lists and values are replaced. In a layer that changes another (a file with `extends`, a
variant, `mini:`, --set) null takes a key back: to none where none is allowed, else to its default; in a free section
(`network:`, `reproduces:`) it removes the key.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.recipes.find import find_recipe
from d2o.recipes.layers import as_layer, merge, over, read_recipe, relicensed
from d2o.recipes.schema import LOADER_KEYS, Recipe, check, shape_of
from d2o.recipes.stores import fill_from_store
from d2o.settings.wording import KeyPath, Schema, child, dotted, is_free, is_section, may_be_null, members, show
from d2o.settings.yaml_text import Mark, Node, Problems, build, compose
from d2o.shipped import shown


def _override(text: str, problems: Problems, flag: str = "--set") -> Node | None:
    """`a.b=value` as a tree; the value is read as YAML, nothing is null. `flag`: how it was given."""
    key, equals, written = text.partition("=")
    key = key.strip()
    mark = Mark(f"{flag} {key or text}")
    parts = key.split(".")
    if not equals or not all(parts):
        problems.add(mark, "expected key=value, for example optim.lr=1e-4")
        return None
    if parts[0] in LOADER_KEYS:
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


def _settled(section: Node, schema: Schema | None) -> JsonObject:
    """Plain data, without the keys that a null takes back to their default (see the top of this file)."""
    required = [key for member in members(schema or {}) for key in member.get("required", [])]
    plain = {}
    for key, inner in section.value.items():
        below = child(schema, key)
        if inner.value is None and below is not None and key not in required:
            if is_free(below):
                dropped = inner.mark.overlay
            else:
                dropped = not may_be_null(below) and (inner.mark.overlay or is_section(below))
            if dropped:
                continue
        plain[key] = _settled(inner, below) if isinstance(inner.value, dict) else inner.value
    return plain


class _Placed(NamedTuple):
    """A problem with its place in the files."""

    mark: Mark
    path: KeyPath
    text: str

    def line(self) -> str:
        """With the key as it was written: in `variants.xs` or `mini` with that in front; none where the mark says it,
        as `--set a.b` does."""
        above = 2 if self.mark.path[:1] == ("variants",) else 0
        above += self.mark.path[above : above + 1] == ("mini",)
        depth = len(self.mark.path) - above
        key = dotted((*self.mark.path, *self.path[depth:]))
        return self.text if not key or self.mark.file in (f"--set {key}", f"--sweep {key}") else f"{key}: {self.text}"


def _checked(root: Node, begun: JsonObject | None) -> tuple[Recipe | None, list[_Placed]]:
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
    begun: JsonObject | None = None,
) -> Recipe:
    """Read, merge and check a recipe. `overrides`: `key=value` of --set; `mini`: apply the recipe's `mini:` section;
    `sweep`: `key=value` of --sweep, over all others. What `pairs:` leaves open is as the store at `pairs.path` says, or
    as in `begun`, the resolved recipe of a run that is continued.

    The `mini:` section is checked in any case. UserError: a line for everything that is wrong, with file, line, key and
    what was expected.
    """
    found, problems = find_recipe(path_or_name), Problems()
    root = read_recipe(found, problems)
    given = [*((text, "--set") for text in overrides), *((text, "--sweep") for text in sweep)]
    changes = [node for node in (_override(text, problems, flag) for text, flag in given) if node is not None]
    small = _small(root, problems)
    if mini and small is None and not problems:
        raise UserError(f"{shown(found.path)} has no `mini:` section", "run it without --mini, or add one")

    chosen = over(root, small) if mini and small is not None else root
    chosen = relicensed(chosen, changes)
    for change in changes:
        chosen = merge(chosen, change)
    unread = frozenset(problems.marks)  # no need to say more about what could not be read
    recipe, wrong = _checked(chosen, begun)
    for problem in wrong:
        if problem.mark not in unread:
            problems.add(problem.mark, problem.line())
    if small is not None and not mini:  # what --mini would stumble over
        alone = set(_checked(root, begun)[1])
        for problem in _checked(over(root, small), begun)[1]:
            if problem not in alone and problem.mark not in unread:
                inside = "mini" in problem.mark.path
                problems.add(problem.mark, problem.line() + ("" if inside else " (with --mini)"))
    if problems or recipe is None:
        raise problems.error()
    return recipe


def _small(root: Node, problems: Problems) -> Node | None:
    """The `mini:` section of a tree, taken out of it, as a layer over the rest; None where there is none."""
    small = root.value.pop("mini", None)
    if small is None or small.value is None:
        return None
    if not isinstance(small.value, dict):
        problems.add(
            small.mark, f"{dotted(small.mark.path)}: expected a section of recipe keys, got {show(small.value)}"
        )
        return None
    for key in [key for key in small.value if key in LOADER_KEYS]:
        mark = small.value.pop(key).mark
        problems.add(mark, f"{dotted(mark.path)}: cannot stand in `mini:`")
    return as_layer(small)
