"""Recipes by name: `quickstart`, and `sid_edm2_512:xs` for a variant of one. Quick, for the shell's completion too:
files are searched for lines, not read as YAML.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from d2o.shipped import recipe_folders

VARIANT = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
"""What a variant may be called: it ends the name of its run."""


class Name(NamedTuple):
    """A recipe as people give it, in its two parts: a file or name, and a variant of it."""

    recipe: str
    variant: str | None = None

    def __str__(self) -> str:
        return self.recipe if self.variant is None else f"{self.recipe}:{self.variant}"


def parted(given: str) -> Name:
    """`sid_edm2_512:xs`, `recipes/sid_edm2_512.yaml:xs` -> the recipe and its variant; without one: None."""
    recipe, colon, variant = given.rpartition(":")
    return Name(recipe, variant) if colon and recipe and re.fullmatch(VARIANT, variant) else Name(given)


def stem(recipe: str) -> str:
    """The name of a shipped recipe as it may be given, with or without `recipes/` and `.yaml`."""
    return recipe.removeprefix("recipes/").removesuffix(".yaml")


def shipped_file(recipe: str) -> Path | None:
    """The file of a recipe that comes with d2o; None where there is none of that name."""
    name = stem(recipe)
    if not name or "/" in name:
        return None
    return next((path for folder in recipe_folders() if os.path.isfile(path := folder / f"{name}.yaml")), None)


def line_of(text: str, key: str) -> str:
    """The value of a key at the top of a recipe's text; "" if it has none."""
    found = re.search(rf"^{key}:[ \t]*(.*?)[ \t]*(#.*)?$", text, re.MULTILINE)
    return found[1].strip("'\"") if found else ""


def variants_in(text: str) -> dict[str, str]:
    """The variants that stand in a recipe's text, with their titles ("" without one)."""
    _, _, block = f"\n{text}".partition("\nvariants:")
    block = re.split(r"\n(?=\S)(?!#)", block)[0]
    parts = re.split(rf"^  ['\"]?({VARIANT})['\"]?:", block, flags=re.MULTILINE)[1:]
    titles = (re.search(r"^ {4}title:[ \t]*(.*?)[ \t]*(#.*)?$", body, re.MULTILINE) for body in parts[1::2])
    return {name: found[1].strip("'\"") if found else "" for name, found in zip(parts[::2], titles, strict=True)}


def shipped_names() -> dict[str, str]:
    """All that can be trained of what comes with d2o, with titles: by name each recipe that is one of its own, then its
    variants in their order."""
    found: dict[str, str] = {}
    paths = {path.stem: path for folder in reversed(recipe_folders()) for path in folder.glob("*.yaml")}
    for _, path in sorted(paths.items()):
        text = path.read_text(encoding="utf-8", errors="replace")
        if line_of(text, "name"):
            found[path.stem] = line_of(text, "title")
        found |= {f"{path.stem}:{name}": title for name, title in variants_in(text).items()}
    return found


def is_shipped(given: str) -> bool:
    """Whether a name, of today or of the release before, is that of something that can be trained."""
    name = parted(renamed(given) or given)
    path = shipped_file(name.recipe)
    if path is None:
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return bool(line_of(text, "name")) if name.variant is None else name.variant in variants_in(text)


# ---- names of the release before -------------------------------------------------------------------------------------

_FAMILIES = {
    "cd_cifar10": "cond",
    "dd_gan_cifar10": "k1 k2 k3",
    "dd_gan_digits": "k1",
    "dmd_cifar10": "noreg",
    "ode_digits": "mse l1 pseudo_huber perceptual rewired sde",
    "sid_cifar10": "uncond_a1.0 uncond_a1.2 cond_a1.0 cond_a1.2",
    "sid_imagenet64": "a1.0 a1.2",
    "sid_ffhq64": "a1.0 a1.2",
    "sid_afhqv2": "a1.0 a1.2",
    "sid_edm2_512": "xs s m l xl xxl",
    "sida_cifar10": "uncond cond",
    "sida_edm2_512": "xs s m l xl xxl",
    "sid2a_cifar10": "uncond_a1.0 uncond_a1.2 cond_a1.0 cond_a1.2",
    "sid2a_imagenet64": "a1.0 a1.2",
    "sid2a_ffhq64": "a1.0 a1.2",
    "sid2a_afhqv2": "a1.0 a1.2",
    "sid2a_edm2_512": "xs s m l xl xxl",
    "spi_gan_cifar10": "k1 k3 k4 k5 fixed_j",
    "spi_gan_digits": "k1 fixed_j",
}
RENAMED = {
    "cd_i_cifar10": "cd_cifar10:cd_i",
    "cd_i_cifar10_unfrozen": "cd_cifar10:cd_i_unfrozen",
    "cd_i_digits": "cd_digits:cd_i",
    "dd_gan_celeba": "dd_gan_256:celeba",
    "dd_gan_church": "dd_gan_256:church",
    "spi_gan_celeba": "spi_gan_256:celeba",
    "spi_gan_church": "spi_gan_256:church",
    **{f"{name}_{variant}": f"{name}:{variant}" for name, all_ in _FAMILIES.items() for variant in all_.split()},
}
"""What was a file of its own and now is a variant. Goes with the next release."""


def renamed(given: str) -> str | None:
    """What a shipped recipe is called now that `given` named in the release before; None where that has not changed."""
    return RENAMED.get(stem(given))
