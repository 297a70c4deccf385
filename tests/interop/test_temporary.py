"""Temporary files of dead writers are removed, those of living ones never."""

import os
import signal
import subprocess
import sys

import pytest

from d2o.interop.temporary import sweep, temporary_file, temporary_folder

WRITER = """
import sys, time
from pathlib import Path
from d2o.interop.temporary import temporary_file, temporary_folder
with temporary_file(Path("x.zip")) as file, temporary_folder(Path("y")) as folder:
    file.write_bytes(b"half")
    (folder / "part").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_nothing_stays_when_the_block_ends(tmp_path):
    with temporary_file(tmp_path / "a") as file, temporary_folder(tmp_path / "b") as folder:
        (folder / "inside").write_text("x")
        assert file.parent == tmp_path and folder.is_dir()
    with pytest.raises(RuntimeError), temporary_file(tmp_path / "a"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_took_another_name_stays(tmp_path):
    with temporary_file(tmp_path / "a") as file:
        file.write_text("x")
        file.rename(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "x"


def test_a_living_writers_files_stay_and_a_killed_ones_go(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", WRITER], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    assert sweep(tmp_path) == 0 and len(list(tmp_path.iterdir())) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "x.zip").write_text("kept")
    assert sweep(tmp_path, "other") == 0
    assert sweep(tmp_path, "x.zip") == 1 and sweep(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]
