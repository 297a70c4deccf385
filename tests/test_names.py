"""One word, one thing: no two modules of d2o call different things by one name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import d2o

ROOT = Path(d2o.__file__).parent
SAME_JOB = {
    # Networks by name are all loaded in one way: `features.load` calls `load` of the module that it finds.
    "load": "d2o.features.",
    # The augmentations of a paper, each in its module: called as `edm.augment`, `latent.augment`.
    "augment": "d2o.augment.",
    "translation": "d2o.augment.",  # of DiffAugment an operation on images; of ADA a map of the plane
    # Of networks that are features too, what a critic takes: `features.load` calls it.
    "load_as_backbone": "d2o.features.",
}
"""Functions that stand in several modules of one package, which are chosen between by name."""
ROLES = {"base", "build", "folder", "generate", "load"}
"""What a file does in its package, whatever the package is about."""
SUBJECTS = {
    "classifier": "the network; the method that trains it; what is read from it",
    "consistency": "the losses; the students that are trained with them",
    "copying": "of a network; of a recipe into a file",
    "dd_gan": "the critic; the method",
    "edm": "the augmentations; the method, both EDM's",
    "inception": "the network; what is read from it",
    "latent": "the networks; the teacher made of them",
    "latent_lpips": "the loss; the method that trains its network",
    "latent_vgg": "the network; what is read from it",
    "style": "StyleGAN2's critic, network, student",
}
"""Names of modules that two floors share because both are about the one thing."""

PACKAGES = {f"d2o.{path.stem}" for path in ROOT.iterdir()}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """(module, its tree) of all modules but those of the command line, whose functions are named as what a user types;
    nothing imports them."""
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(["d2o", *path.relative_to(ROOT).with_suffix("").parts])
        if not name.startswith("d2o.cli."):
            yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def defined(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(class | function | alias, name) of what a module defines for others. Constraints of single fields
    (`Annotated[...]`) are no things of their own."""
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name):
                yield "class", name
            case ast.FunctionDef(name=name):
                yield "function", name
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() | ast.BinOp() | ast.Name()):
                if re.match(r"[A-Z]\w*[a-z]", name) and not ast.unparse(node.value).startswith("Annotated["):
                    yield "class", name


def twice(sources: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Public names of classes, aliases and functions -> the modules that define them, where these are several."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, tree in sources.items():
        for kind, name in defined(tree):
            if not name.startswith("_") and not module.startswith(SAME_JOB.get(name, "-")):
                places[kind, name].append(module)
    return {name: where for (_, name), where in places.items() if len(where) > 1}


def alike(modules: list[str]) -> dict[str, list[str]]:
    """Modules that differ by a plural alone, or that have the same name for another reason than those above."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        places[module.rpartition(".")[2].removesuffix("s")].append(module)
    found = {}
    for where in places.values():
        names = {module.rpartition(".")[2] for module in where}
        if len(where) > 1 and not (len(names) == 1 and names <= {*ROLES, *SUBJECTS}):
            found[sorted(names)[0]] = where
    return found


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return dict(sources())


def test_no_class_and_no_public_function_is_defined_twice(trees):
    assert twice(trees) == {}


def test_no_module_differs_from_another_by_a_plural(trees):
    assert alike([name for name in trees if name.count(".") > 1]) == {}


def test_every_exception_is_still_needed(trees):
    names = [name.rpartition(".")[2] for name in trees]
    assert {name for name in {*ROLES, *SUBJECTS} if names.count(name) < 2} == set()


def test_nothing_imports_the_package_that_it_is_a_part_of(trees):
    """Else every module of d2o were in a circle with `d2o/__init__.py`."""
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert "d2o" not in {alias.name for alias in node.names}, module
            if isinstance(node, ast.ImportFrom):
                assert node.module != "d2o" or all(f"d2o.{alias.name}" in PACKAGES for alias in node.names), module


def test_a_second_one_is_found():
    def trees(**texts: str) -> dict[str, ast.Module]:
        return {name: ast.parse(text) for name, text in texts.items()}

    assert twice(trees(a="class Batch: ...", b="class Batch: ...")) == {"Batch": ["a", "b"]}
    assert twice(trees(a="Batch = dict[str, int]", b="class Batch: ...")) == {"Batch": ["a", "b"]}
    assert twice(trees(a="Batch = int | str", b="Batch = Other")) == {"Batch": ["a", "b"]}
    assert twice(trees(a="Batch = Annotated[int, Field(ge=1)]", b="class Batch: ...")) == {}
    assert twice(trees(a="def read(): ...", b="def read(): ...")) == {"read": ["a", "b"]}
    assert twice(trees(a="def _read(): ...\nclass Batch: ...", b="def _read(): ...\nX = 1")) == {}
    assert alike(["d2o.a.table", "d2o.b.tables"]) == {"table": ["d2o.a.table", "d2o.b.tables"]}
    assert alike(["d2o.a.plan", "d2o.b.plan"]) == {"plan": ["d2o.a.plan", "d2o.b.plan"]}
    assert alike(["d2o.a.base", "d2o.b.base"]) == {}
