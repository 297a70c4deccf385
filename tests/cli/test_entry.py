"""The program as a process: interrupted while it imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

IMPORTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"


@pytest.mark.parametrize("module", ["typer", "torch"])
def test_an_interruption_of_the_imports_ends_without_a_traceback(tmp_path: Path, module: str) -> None:
    """`typer` is imported by the command line, `torch` by the command: here a module of that name interrupts its own
    import."""
    (tmp_path / f"{module}.py").write_text(IMPORTED)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [
        sys.executable,
        "-m",
        "d2o",
        "sample",
        "absent.safetensors",
        "--n",
        "4",
        "--out",
        str(tmp_path / "x.zip"),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell ignores it in what runs behind it
    assert (done.returncode, done.stderr) == (130, "stopped\n")
