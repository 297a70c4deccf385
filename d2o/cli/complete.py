"""What the shell offers behind TAB: names and files. Quick, without torch."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from pathlib import Path

import typer

from d2o.cli.words import load
from d2o.shipped import recipe_folders, table_folders

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
    """Recipes by name, with their titles, and files."""
    paths = {
        path.stem: path
        for folder in reversed(recipe_folders())
        for path in folder.glob(f"{glob.escape(incomplete)}*.yaml")
    }
    return [(name, _line(paths[name], "title")) for name in sorted(paths)] + (
        files(incomplete, ".yaml") if incomplete else []
    )


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


def _method(name: str) -> str | None:
    stem = name.removeprefix("recipes/").removesuffix(".yaml")
    paths = [Path(name), *(folder / f"{stem}.yaml" for folder in recipe_folders())]
    for path in paths:
        if path.is_file():
            base = _line(path, "extends")
            return _line(path, "method") or (
                _method(str(path.parent / base) if (path.parent / base).is_file() else base) if base else None
            )
    return None


def _line(path: Path, key: str) -> str:
    """The value of a key at the top of a recipe, without reading all of it; "" if it has none."""
    found = re.search(rf"^{key}: *(.*?) *(#.*)?$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1].strip("'\"") if found else ""
