"""The recipes that come with d2o, each in a line: what it trains, from what, towards which number, whether it can run
here. Files are read and merged, not checked: that takes the methods' code."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from d2o.inputs import JsonObject
from d2o.interop import catalogue
from d2o.interop.download import offline
from d2o.recipes.find import find_recipe, recipe_names
from d2o.recipes.layers import read_recipe
from d2o.settings.yaml_text import Problems, plain

LONG = 2_000_000
"""Images that take days on a CPU: recipes of digits have at most a quarter of it, those of papers many times it."""


@dataclass(frozen=True)
class Entry:
    """One recipe or variant. `missing`: why it would not start on this machine; `fetches`: what it would download."""

    name: str
    title: str
    method: str
    teacher: str
    data: str
    reproduces: str
    images: int
    mini: bool
    missing: tuple[str, ...]
    fetches: tuple[str, ...]

    @property
    def here(self) -> str:
        """Whether it can run here, in a few words."""
        if self.missing:
            return "no: " + "; ".join(self.missing) + (" (--mini runs)" if self.mini else "")
        return "fetches " + ", ".join(self.fetches) if self.fetches else "yes"


def entries(like: str = "") -> Iterator[Entry]:
    """All shipped recipes in which `like` occurs (in any column; case does not matter), by name."""
    for name in recipe_names():
        entry = _entry(name)
        words = (entry.name, entry.title, entry.method, entry.teacher, entry.data, entry.reproduces)
        if like.lower() in " ".join(words).lower():
            yield entry


def _entry(name: str) -> Entry:
    keys = plain(read_recipe(find_recipe(name), Problems()))
    data, pairs = keys.get("data") or {}, keys.get("pairs") or {}
    teacher, path = keys.get("teacher") or "", data.get("path", "")
    missing: list[str] = []
    fetches: list[str] = []
    if path and not path.startswith("real:") and not os.path.exists(path):
        missing.append(f"needs {path}")
    published = catalogue.find(teacher) if teacher else None
    if published is not None and not os.path.exists(teacher) and catalogue.path_if_here(published) is None:
        setting = offline()
        (missing if setting else fetches).append(f"needs its teacher, and {setting}" if setting else "its teacher")
    if keys.get("images", 0) >= LONG and not torch.cuda.is_available():
        missing.append("too long for a CPU")
    made = f"{pairs['n']:,} pairs, made" if "n" in pairs else ""
    return Entry(
        name,
        keys.get("title", ""),
        keys.get("method", ""),
        teacher,
        " and ".join(filter(None, (path, made))),
        target(keys.get("reproduces") or {}),
        keys.get("images", 0),
        bool(keys.get("mini")),
        tuple(missing),
        tuple(fetches),
    )


def target(reproduces: JsonObject) -> str:
    """`reproduces:` in a line: paper, table, row, and the printed numbers."""
    where = [str(reproduces.get("paper") or "")]
    where += [f"{kind} {reproduces[kind]}" for kind in ("table", "figure") if reproduces.get(kind) is not None]
    where += [str(reproduces["row"])] if reproduces.get("row") else []
    value = reproduces.get("value")
    numbers = value.items() if isinstance(value, Mapping) else [("", value)] if value is not None else []
    printed = ", ".join(f"{key} {_number(printed)}".strip() for key, printed in numbers if printed is not None)
    return ": ".join(filter(None, (", ".join(filter(None, where)), printed)))


def _number(value: object) -> str:
    return f"{value[0]} ± {value[1]}" if isinstance(value, list) and len(value) == 2 else str(value)
