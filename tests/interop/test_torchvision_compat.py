"""Each case is a fresh interpreter: an import can be tried only once per process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with `path` in front of the installed packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def answer(code: str, *path: Path) -> str:
    result = python(code, *path)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def fake_torchvision(folder: Path, init: str, **submodules: str) -> Path:
    package = folder / "torchvision"
    package.mkdir()
    for name, text in {"__init__": init, **submodules}.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Fails as the real one does: a submodule is imported, then another asks for an operator that nobody has
    registered."""
    register = """
        import torch
        import torchvision.extension

        torchvision.extension.tried()
        @torch.library.register_fake("torchvision::nms")
        def nms(dets, scores, iou_threshold):
            return dets
    """
    init = "from . import extension\nfrom torchvision import register"
    return fake_torchvision(tmp_path, init, extension="def tried(): pass", register=register)


def test_the_installed_torchvision_imports_after_ensure() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("torchvision", "lpips", "timm")):
        pytest.skip("needs torchvision, lpips and timm")
    plain = python("import torchvision")
    out = answer("""
        from d2o.interop.torchvision_compat import ensure
        declared = ensure()
        import torch, torchvision, torchvision.transforms, lpips, timm
        assert torchvision.extension._has_ops() is not declared
        torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), [4, 4])
        print(declared, ensure())
    """)
    if plain.returncode == 0:  # healthy: nothing was declared
        assert out == "False False"
    else:
        assert "torchvision::nms does not exist" in plain.stderr
        assert out == "True True"


def test_a_broken_torchvision_is_mended_and_nothing_half_imported_remains(broken: Path) -> None:
    assert "operator torchvision::nms does not exist" in python("import torchvision", broken).stderr
    out = answer(
        """
        import sys
        from d2o.interop.torchvision_compat import ensure
        assert ensure()
        assert not [name for name in sys.modules if name.startswith("torchvision")]
        import torchvision.register
        assert ensure()
        print(torchvision.__file__)
        """,
        broken,
    )
    assert Path(out).parent == broken / "torchvision"


def test_a_declared_operator_says_why_it_cannot_be_called(broken: Path) -> None:
    error = python(
        """
        from d2o.interop.torchvision_compat import ensure
        ensure()
        import torch, torchvision
        torch.ops.torchvision.nms(torch.zeros(2, 4), torch.zeros(2), 0.5)
        """,
        broken,
    ).stderr
    assert "RuntimeError: torchvision::nms is not available: this torchvision was compiled for another torch" in error


def test_a_failed_import_before_ensure_does_no_harm(broken: Path) -> None:
    out = answer(
        """
        import contextlib
        with contextlib.suppress(RuntimeError):
            import torchvision
        from d2o.interop.torchvision_compat import ensure
        assert ensure()
        import torchvision.register
        print(torchvision.extension.tried())
        """,
        broken,
    )
    assert out == "None"


def test_several_threads_declare_once(broken: Path) -> None:
    out = answer(
        """
        from concurrent.futures import ThreadPoolExecutor
        from d2o.interop.torchvision_compat import ensure
        with ThreadPoolExecutor(8) as pool:
            print(all(pool.map(lambda _: ensure(), range(16))))
        """,
        broken,
    )
    assert out == "True"


def test_a_healthy_torchvision_is_left_alone(tmp_path: Path) -> None:
    healthy = """
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", lambda dets, scores, iou_threshold: scores + 1, "CPU")
    """
    out = answer(
        """
        from d2o.interop.torchvision_compat import ensure
        assert not ensure() and not ensure()
        import torch, torchvision
        nms = torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        print(nms.item(), hasattr(torch.ops.torchvision, "qnms"))
        """,
        fake_torchvision(tmp_path, healthy),
    )
    assert out == "1.0 False"


def test_one_already_imported_is_left_alone(tmp_path: Path) -> None:
    out = answer(
        """
        import sys, torchvision
        from d2o.interop.torchvision_compat import ensure
        print(ensure(), "torch" in sys.modules)
        """,
        fake_torchvision(tmp_path, ""),
    )
    assert out == "False False"


def test_an_absent_torchvision_is_no_matter() -> None:
    out = answer("""
        import importlib.util, sys
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name == "torchvision" else found(name, *more)
        from d2o.interop.torchvision_compat import ensure
        print(ensure(), "torch" in sys.modules)
    """)
    assert out == "False False"


def test_a_failure_of_another_kind_keeps_its_own_message(tmp_path: Path) -> None:
    result = python(
        """
        from d2o.interop.torchvision_compat import ensure
        assert not ensure()
        import torchvision
        """,
        fake_torchvision(tmp_path, "from . import extension\nraise ImportError('libjpeg is missing')", extension=""),
    )
    assert "ImportError: libjpeg is missing" in result.stderr
