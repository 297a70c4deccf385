"""Each case is a process of its own: an import can be tried only once in each. Those that need torch are forked from an
interpreter that has imported it, and nothing else: that alone takes seconds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Python = Callable[..., "subprocess.CompletedProcess[str]"]


FORKING = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, path, out, err = json.loads(line)
    if (child := os.fork()) == 0:
        status = 1
        try:
            for name, handle in ((out, 1), (err, 2)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
            sys.path[:0] = path
            exec(compile(code, "case", "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Python]:
    """`python`, with torch imported already."""
    folder = tmp_path_factory.mktemp("forked")
    server = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert server.stdin is not None and server.stdout is not None

    def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
        out, err = folder / "out", folder / "err"
        given = [textwrap.dedent(code), [str(place) for place in path], str(out), str(err)]
        server.stdin.write(json.dumps(given) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([], code, out.read_text(), err.read_text())

    yield run
    server.stdin.close()
    server.wait(20)


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with `path` in front of the installed packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def answer(code: str, *path: Path, by: Python = python) -> str:
    result = by(code, *path)
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


@pytest.mark.long
def test_the_installed_torchvision_imports_after_ensure(with_torch: Python) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("torchvision", "lpips", "timm")):
        pytest.skip("needs torchvision, lpips and timm")
    plain = with_torch("import torchvision")
    out = answer(
        """
        from d2o.interop.torchvision_compat import ensure
        declared = ensure()
        import torch, torchvision, torchvision.transforms, lpips, timm
        assert torchvision.extension._has_ops() is not declared
        torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), [4, 4])
        print(declared, ensure())
        """,
        by=with_torch,
    )
    if plain.returncode == 0:  # healthy: nothing was declared
        assert out == "False False"
    else:
        assert "torchvision::nms does not exist" in plain.stderr
        assert out == "True True"


def test_a_broken_torchvision_is_mended_and_nothing_half_imported_remains(broken: Path, with_torch: Python) -> None:
    assert "operator torchvision::nms does not exist" in with_torch("import torchvision", broken).stderr
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
        by=with_torch,
    )
    assert Path(out).parent == broken / "torchvision"


def test_a_declared_operator_says_why_it_cannot_be_called(broken: Path, with_torch: Python) -> None:
    error = with_torch(
        """
        from d2o.interop.torchvision_compat import ensure
        ensure()
        import torch, torchvision
        torch.ops.torchvision.nms(torch.zeros(2, 4), torch.zeros(2), 0.5)
        """,
        broken,
    ).stderr
    assert "RuntimeError: torchvision::nms is not available: this torchvision was compiled for another torch" in error


def test_a_failed_import_before_ensure_does_no_harm(broken: Path, with_torch: Python) -> None:
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
        by=with_torch,
    )
    assert out == "None"


def test_several_threads_declare_once(broken: Path, with_torch: Python) -> None:
    out = answer(
        """
        from concurrent.futures import ThreadPoolExecutor
        from d2o.interop.torchvision_compat import ensure
        with ThreadPoolExecutor(8) as pool:
            print(all(pool.map(lambda _: ensure(), range(16))))
        """,
        broken,
        by=with_torch,
    )
    assert out == "True"


def test_a_healthy_torchvision_is_left_alone(tmp_path: Path, with_torch: Python) -> None:
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
        by=with_torch,
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


@pytest.mark.long
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
