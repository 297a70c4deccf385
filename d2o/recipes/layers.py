"""The tree of a recipe file: what it extends, its own lines, and a variant of either, merged."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from yaml.nodes import MappingNode, SequenceNode

from d2o.errors import UserError, nearest
from d2o.recipes.find import Found, find_recipe
from d2o.recipes.schema import LOADER_KEYS
from d2o.settings.recipe_names import VARIANT, parted
from d2o.settings.wording import show
from d2o.settings.yaml_text import Mark, Node, Problems, build, read
from d2o.shipped import shown


def read_recipe(found: Found, problems: Problems) -> Node:
    """The tree of a recipe, `mini:` still in it: the extended file < its variant < the file < the file's variant.

    UserError: unreadable, not YAML with keys at the top, a bad `extends`, no such variant, or none where one has to be
    chosen. What is wrong with single keys goes into `problems`.
    """
    own = _read(found.path, problems)
    base = _extended(own, found.path, problems)
    known = [*dict.fromkeys([*own.variants, *(base.variants if base else ())])]
    if found.variant is not None and found.variant not in known:
        raise _no_variant(shown(found.path), found.variant, known)
    nothing_alone = own.nothing_alone or (base is not None and base.nothing_alone)
    if found.variant is None and nothing_alone:
        raise UserError(f"{shown(found.path)} is trained as one of its variants", _choose(found.path.stem, known))
    change = own.chosen(found.variant)
    below = [] if base is None else [base.keys, *base.chosen(found.variant)]
    layers = [*below, own.keys, *change]
    root = over(layers[0], *layers[1:])
    if found.variant is not None and not (change and "name" in change[0].value):
        root.value["name"] = _variants_name(own.keys.value.get("name"), found)
    return Node(root.value, own.keys.mark)


def _variants_name(name: Node | None, found: Found) -> Node:
    """What a variant's run is called that does not say it itself: as the recipe, with the variant behind."""
    if name is None:
        return Node(f"{found.path.stem}_{found.variant}", Mark(shown(found.path), line=1))
    return Node(f"{name.value}_{found.variant}", name.mark) if isinstance(name.value, str) else name


def variants_of(found: Found) -> list[str]:
    """The variants of a recipe, its own before those of what it extends. UserError: as `read_recipe`."""
    problems = Problems()
    own = _read(found.path, problems)
    base = _extended(own, found.path, problems)
    return [*dict.fromkeys([*own.variants, *(base.variants if base else ())])]


def _choose(name: str, known: Iterable[str]) -> str:
    return f"choose one: {', '.join(f'{name}:{variant}' for variant in known)}"


def _no_variant(where: str, variant: str, known: list[str]) -> UserError:
    if not known:
        return UserError(f"{where} has no variants, so no {variant!r}", "leave the variant away")
    near = nearest(variant, known)
    advice = f"; did you mean {near!r}?" if near else ""
    return UserError(f"{where} has no variant {variant!r}{advice}", f"known variants: {', '.join(known)}")


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass
class _File:
    """What stands in one file: its keys, `mini` among them, and its variants."""

    keys: Node
    variants: Mapping[str, Node]

    @property
    def nothing_alone(self) -> bool:
        """Whether it is a run only as one of its variants."""
        return bool(self.variants) and "name" not in self.keys.value

    def chosen(self, variant: str | None) -> list[Node]:
        """The layers that a variant adds: one, or none where it is not in this file."""
        return [self.variants[variant]] if variant is not None and variant in self.variants else []


def _read(path: Path, problems: Problems) -> _File:
    """UserError: unreadable, or not YAML with keys at the top."""
    root = read(path, "recipe")
    where = shown(path)
    if root is None or (root.tag.endswith(":null") and not root.value):
        raise UserError(f"{where} is empty; a recipe has at least name, method, optim, batch and images")
    if not isinstance(root, MappingNode):
        got = "a list" if isinstance(root, SequenceNode) else "a text"
        raise UserError(f"{where}:{root.start_mark.line + 1}: not a recipe: expected lines of `key: value`, got {got}")
    extends = any(key.value == "extends" for key, _ in root.value)
    keys = build(root, Mark(where, line=1, overlay=extends), problems)
    return _File(keys, _variants(keys.value.pop("variants", None), problems))


def _variants(node: Node | None, problems: Problems) -> dict[str, Node]:
    """The variants of a file as layers over it; what cannot be one is reported and left out."""
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        problems.add(node.mark, f"variants: expected a section with a section of keys for each, got {show(node.value)}")
        return {}
    found: dict[str, Node] = {}
    for name, inner in node.value.items():
        where = f"variants.{name}"
        if not re.fullmatch(VARIANT, name):
            problems.add(inner.mark, f"{where}: a variant is called by letters, digits and . _ + -")
            continue
        if inner.value is not None and not isinstance(inner.value, dict):
            problems.add(inner.mark, f"{where}: expected a section of recipe keys, got {show(inner.value)}")
            continue
        keys = dict(inner.value or {})
        for key in [key for key in keys if key in LOADER_KEYS and key != "mini"]:
            problems.add(keys.pop(key).mark, f"{where}.{key}: cannot stand in a variant")
        found[name] = as_layer(Node(keys, inner.mark))
    return found


def _extended(own: _File, path: Path, problems: Problems) -> _File | None:
    """The recipe that a file extends, if any, with the variant that it names in place. `extends` is taken out."""
    extends = own.keys.value.pop("extends", None)
    if extends is None or extends.value is None:
        return None
    where = f"{extends.mark.file}:{extends.mark.line}: extends"
    if not isinstance(extends.value, str) or not extends.value:
        raise UserError(f"{where}: expected the path or name of one recipe, got {show(extends.value)}")
    wanted = parted(extends.value)
    beside = [path.parent / wanted.recipe, path.parent / f"{wanted.recipe}.yaml"]
    near = next((Found(candidate, wanted.variant) for candidate in beside if os.path.isfile(candidate)), None)
    try:
        found = near or find_recipe(extends.value)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint) from error
    if os.path.samefile(found.path, path):
        raise UserError(f"{where}: {extends.value} is this file itself")
    base = _read(found.path, problems)
    if "extends" in base.keys.value:
        further = show(base.keys.value["extends"].value)
        raise UserError(f"{where}: {extends.value} itself extends {further}; only one level is allowed")
    if found.variant is None:
        return base
    if found.variant not in base.variants:
        none = _no_variant(shown(found.path), found.variant, [*base.variants])
        raise UserError(f"{where}: {none.message}", none.hint)
    change = base.variants[found.variant]
    root = over(base.keys, change)
    if "name" not in change.value:
        root.value["name"] = _variants_name(base.keys.value.get("name"), found)
    return _File(root, {})


# ---- merging ---------------------------------------------------------------------------------------------------------


def as_layer(node: Node) -> Node:
    """A section as a layer over others (`mini:`, a variant): its marks count as changes."""
    mark = replace(node.mark, overlay=True)
    return Node(
        {key: as_layer(inner) for key, inner in node.value.items()} if isinstance(node.value, dict) else node.value,
        mark,
    )


def over(low: Node, *layers: Node) -> Node:
    """`layers` over `low`, one after another."""
    for layer in layers:
        low = merge(relicensed(low, [layer]), layer)
    return low


def merge(low: Node, high: Node) -> Node:
    """`high` over `low`: sections key by key, everything else replaced. Neither is changed. A section stays marked
    where it was begun."""
    if not isinstance(low.value, dict) or not isinstance(high.value, dict):
        return high
    merged = dict(low.value)
    for key, node in high.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, low.mark)


def _names_images(layer: Node, key: str = "path") -> object:
    """What a layer says of `data.path`, or of another key of that section; None if nothing."""
    data = layer.value.get("data")
    return data.value[key].value if data is not None and isinstance(data.value, dict) and key in data.value else None


def relicensed(low: Node, layers: Iterable[Node]) -> Node:
    """`low` without its `data.licence` where layers that will be merged over it name other images: those have a licence
    of their own."""
    paths = [path for layer in layers if (path := _names_images(layer)) is not None]
    if not paths or paths[-1] == _names_images(low) or _names_images(low, "licence") is None:
        return low
    data = low.value["data"]
    rest = {key: node for key, node in data.value.items() if key != "licence"}
    return Node({**low.value, "data": Node(rest, data.mark)}, low.mark)
