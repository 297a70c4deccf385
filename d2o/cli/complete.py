"""What the shell offers behind TAB: names and files. Quick, without torch."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path

import typer

from d2o.cli.words import load
from d2o.settings.recipe_names import line_of, parted, renamed, shipped_file, shipped_names, variants_in
from d2o.shipped import table_folders

CHECKPOINTS = (".safetensors", ".pkl")
Offer = list[tuple[str, str]]
"""Words, each with what it is."""


def files(incomplete: str, *suffixes: str) -> Offer:
    """Folders, and files of these endings (of any if there are none)."""
    found = [(path, Path(path)) for path in sorted(glob.glob(glob.escape(incomplete) + "*"))]
    return [
        (f"{text}/" if path.is_dir() else text, "")
        for text, path in found
        if path.is_dir() or not suffixes or path.suffix in suffixes
    ]


def recipes(incomplete: str) -> Offer:
    """Recipes by name, variants behind a colon, with their titles; and files."""
    if ":" in incomplete:
        name = incomplete.partition(":")[0]
        return [
            (f"{name}:{variant}", title)
            for variant, title in _variants(name).items()
            if f"{name}:{variant}".startswith(incomplete)
        ]
    names = shipped_names()
    stems = dict.fromkeys(name.partition(":")[0] for name in names if name.startswith(incomplete))
    found = [(name, names[name]) for name in names if name.partition(":")[0] in stems]
    return found + (files(incomplete, ".yaml") if incomplete else [])


def variants(context: typer.Context, incomplete: str) -> Offer:
    """The variants of the recipe that was named before."""
    return [
        (variant, title)
        for word in [context.params.get("recipe"), *context.args]
        if word
        for variant, title in _variants(str(word)).items()
        if variant.startswith(incomplete)
    ]


def _variants(name: str) -> dict[str, str]:
    """The variants of a recipe and of what it extends, with their titles."""
    if (path := _file(name)) is None:
        return {}
    text = _text(path)
    base = _file(line_of(text, "extends"), path.parent) if line_of(text, "extends") else None
    return {**(variants_in(_text(base)) if base else {}), **variants_in(text)}


def _file(name: str, beside: Path | None = None) -> Path | None:
    """The file of a recipe by path (beside another one, if it is given) or name."""
    recipe = parted(renamed(name) or name).recipe
    paths = [Path(recipe)] if beside is None else [beside / recipe, beside / f"{recipe}.yaml"]
    return next((path for path in paths if path.is_file()), shipped_file(recipe))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def tables(incomplete: str) -> Offer:
    """The tables of papers."""
    return [
        (name, "")
        for name in sorted(
            {p.stem for folder in table_folders() for p in folder.glob(f"{glob.escape(incomplete)}*.yaml")}
        )
    ]


def of(kind: str, *suffixes: str, paths: bool = False) -> Callable[[str], Offer]:
    """The words of that kind in `words.json`; with `paths`, files of these endings too."""

    def offer(incomplete: str) -> Offer:
        return [(word, "") for word in load()[kind] if word.startswith(incomplete)] + (
            files(incomplete, *suffixes) if paths else []
        )

    return offer


def checkpoints(incomplete: str) -> Offer:
    """Checkpoints and run folders."""
    return files(incomplete, *CHECKPOINTS)


teachers = of("teachers", *CHECKPOINTS, paths=True)
subjects = of("teachers", paths=True)
references = of("references", paths=True)


def among(*words: str) -> Callable[[str], Offer]:
    """One of a few words."""
    return lambda incomplete: [(word, "") for word in words if word.startswith(incomplete)]


def metrics(incomplete: str) -> Offer:
    """The last of several, parted by commas."""
    before, comma, last = incomplete.rpartition(",")
    return [(f"{before}{comma}{word}", "") for word in load()["metrics"] if word.startswith(last)]


def keys(context: typer.Context, incomplete: str) -> Offer:
    """KEY= of the recipe that was named before, its method's own keys among them; of all methods where there is
    none."""
    known = load()["keys"]
    words = [context.params.get("recipe"), *context.args]  # an option without its value yet leaves the rest unparsed
    method = next((found for word in words if word and (found := _method(str(word)))), None)
    own = known.get(method) if method else [key for name in known if name for key in known[name]]
    return [
        (f"{key}=", "") for key in [*known[""], *(own or [])] if key.startswith(incomplete) and "=" not in incomplete
    ]


def all_keys(incomplete: str) -> Offer:
    """Keys of recipes, of all methods."""
    words = [key for keys_ in load()["keys"].values() for key in keys_]
    return [(key, "") for key in dict.fromkeys(words) if key.startswith(incomplete)]


def _method(name: str) -> str | None:
    """The method of a recipe, or of the one that it extends."""
    if (path := _file(name)) is None:
        return None
    method, extends = (line_of(_text(path), key) for key in ("method", "extends"))
    base = _file(extends, path.parent) if extends else None
    return method or (line_of(_text(base), "method") if base else None)
