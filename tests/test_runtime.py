"""What a process asks of its surroundings before the heavy imports."""

import os
import subprocess
import sys
import tempfile

import pytest

from d2o.runtime import SPINS, share_cores

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back whatever the test does
        monkeypatch.delenv(name)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where processes know of each other
    monkeypatch.setattr(tempfile, "tempdir", None)
    return monkeypatch


def test_idle_threads_make_way(clean):
    share_cores()
    assert (os.environ["GOMP_SPINCOUNT"], os.environ["KMP_BLOCKTIME"]) == (
        SPINS,
        "0",
    ) and "OMP_WAIT_POLICY" not in os.environ


def test_beside_another_d2o_they_make_way_at_once(clean):
    script = (
        "import os; from d2o.runtime import share_cores; share_cores(); print(os.environ['GOMP_SPINCOUNT'],"
        " flush=True); input()"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline().strip() == SPINS
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "0"
    first.kill()  # whatever ends it, it no longer counts
    first.wait()
    clean.delenv("GOMP_SPINCOUNT")
    clean.delenv("KMP_BLOCKTIME")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == SPINS


@pytest.mark.parametrize(
    "name, value", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "9")]
)
def test_what_the_user_chose_stands(clean, name, value):
    clean.setenv(name, value)
    share_cores()
    assert {key: os.environ[key] for key in NAMES if key in os.environ} == {name: value}


def test_the_command_asks_before_torch_is_there(clean):
    script = """
import os, sys
from d2o.cli import app
def look(*a, **k): print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules); return 0
app.app = look
sys.argv = ["d2o"]
app.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [SPINS, "False"], done.stderr
