"""What is built, what is installed, and what an import costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import d2o

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path) -> str:
    """The command's standard output; an error of the command fails the test with all that it said."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PIP_CONSTRAINT", "PIP_REQUIRE_VIRTUALENV")
    }
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


def files(folder: str) -> set[str]:
    """Everything below a folder of the checkout that belongs to the project, relative to that folder."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT / folder).as_posix()
        for path in found
        if "__pycache__" not in path.parts and path.suffix != ".tmp"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, and without touching the checkout."""
    out = tmp_path_factory.mktemp("dist")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        ROOT,
        cwd=out,
    )
    (built,) = out.glob("d2o-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, that borrows all other packages from the running one; nothing is
    downloaded."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # After ours on sys.path, and a .pth file found there is not followed: an editable d2o stays out of sight.
    (site / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder


@pytest.mark.long
def test_the_wheel_holds_package_recipes_assets_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        name.removeprefix("d2o/")
        for name in names
        if name.startswith("d2o/") and not name.startswith("d2o/recipes/builtin/")
    }
    assert package == files("d2o") - {f"recipes/builtin/{name}" for name in files("recipes")}
    assert {
        name.removeprefix("d2o/recipes/builtin/") for name in names if name.startswith("d2o/recipes/builtin/")
    } == files("recipes")
    others = {name.partition("/")[0] for name in names} - {"d2o"}
    assert others == {f"d2o-{d2o.__version__}.dist-info"}
    assert f"d2o-{d2o.__version__}.dist-info/licenses/LICENSE" in names
    assert wheel.stat().st_size < 14 * 2**20


@pytest.mark.long
def test_an_installed_d2o_finds_its_recipes_and_assets(installed: Path, tmp_path: Path) -> None:
    code = """if True:
        import json
        from importlib.resources import files
        import d2o
        def below(folder):
            files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
            return sorted(p.relative_to(folder).as_posix() for p in files)
        root = files("d2o")
        recipes = below(root / "recipes" / "builtin")
        print(json.dumps({"file": d2o.__file__, "recipes": recipes, "assets": below(root / "assets")}))
    """
    found = json.loads(run(installed / "bin" / "python", "-c", code, cwd=tmp_path))
    assert Path(found["file"]).is_relative_to(installed)
    assert set(found["recipes"]) == files("recipes")
    assert set(found["assets"]) == files("d2o/assets")


def test_the_installed_command_and_module_run(installed: Path, tmp_path: Path) -> None:
    assert run(installed / "bin" / "d2o", "--version", cwd=tmp_path) == f"d2o {d2o.__version__}"
    assert run(installed / "bin" / "python", "-m", "d2o", "--version", cwd=tmp_path) == f"d2o {d2o.__version__}"


@pytest.mark.long
def test_an_installed_d2o_distils_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    small = ["pairs.n=64", "pairs.steps=2", "images=256", "eval={every: 256, n: 64}", "preview=null"]
    settings = [word for setting in small for word in ("--set", setting)]
    run(installed / "bin" / "d2o", "train", "quickstart", "--mini", *settings, cwd=tmp_path)
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"runs/quickstart-mini/recipe.yaml", "runs/quickstart-mini/checkpoints/best.safetensors"} <= made
    assert any(name.startswith("runs/pairs/digits-heun2-n64-seed0/") for name in made)


@pytest.mark.long
def test_the_source_archive_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--quiet", "--no-isolation", "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (archive,) = tmp_path.glob("d2o-*.tar.gz")
    with tarfile.open(archive) as tar:
        tops = {name.split("/")[1] for name in tar.getnames() if "/" in name}
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    assert {"d2o", "recipes", "tests", "LICENSE", "README.md", "pyproject.toml"} <= tops
    assert not tops & {".venv", ".git", "runs", "dist"}
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
        source,
        cwd=tmp_path,
    )
    (again,) = tmp_path.glob("d2o-*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


HELP = """
from d2o.cli.app import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize("what", ["import d2o", HELP])
def test_import_and_help_are_light(what: str, tmp_path: Path) -> None:
    names = {"torch", "numpy", "transformers", "PIL", "pydantic", "yaml", "rich.progress"}  # 0.25 s without them
    heavy = f"print('heavy:', *sorted({names} & set(sys.modules)))"
    out = run(sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{what}\n{heavy}", cwd=tmp_path)
    assert out.endswith("heavy:"), out[-200:]


def test_constraints_pin_every_installed_requirement() -> None:
    """All that d2o and its extras pull in on this Python has exactly one version in constraints.txt."""
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    names = [normal(pin.name) for pin in here]
    assert sorted(set(names)) == sorted(names)
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    if any(
        metadata.version(pin.name) != str(pin.specifier)[2:]
        for pin in here
        if normal(pin.name) in ("numpy", "pydantic", "diffusers")
    ):
        pytest.skip("this environment was not installed with constraints.txt, so what it holds says nothing about it")
    assert required() <= set(names)


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def required() -> set[str]:
    """The names of everything that pyproject.toml asks for, directly or not, as far as it is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [
        Requirement(text)
        for texts in (project["dependencies"], *project["optional-dependencies"].values())
        for text in texts
    ]
    seen: set[str] = set()
    while todo:
        name = normal(todo.pop().name)
        if name in seen:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        seen.add(name)
        if name != "torch":  # a CUDA build pins its own nvidia packages, by ==
            more = [Requirement(text) for text in requires]
            todo += [one for one in more if one.marker is None or one.marker.evaluate({"extra": ""})]
    return seen
