"""Where the files are that come with d2o and that people read: recipes, and the tables of papers."""

from __future__ import annotations

from pathlib import Path


def recipe_folders() -> list[Path]:
    """Where recipes are looked up by name: the checkout's `recipes/`, and those inside an installed package."""
    package = Path(__file__).resolve().parent
    checkout = (
        [package.parent / "recipes"] if (package.parent / "pyproject.toml").is_file() else []
    )  # else it is site-packages
    return [folder for folder in (*checkout, package / "recipes" / "builtin") if folder.is_dir()]


def table_folders() -> list[Path]:
    """Where tables are looked up by name: `tables/` in each of the folders of recipes."""
    return [folder / "tables" for folder in recipe_folders() if (folder / "tables").is_dir()]


def shown(path: Path) -> str:
    """A path for people to read: relative where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
