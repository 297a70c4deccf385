"""Processes that do d2o's work, to be killed. They are forked from a server that has imported torch once, which saves seconds each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from d2o.cli import app, eval, export, pairs, sample, train  # noqa: F401  (so that the server has them)
from d2o.data.work import WorkFolder
from d2o.export import source  # noqa: F401
from d2o.students import generate  # noqa: F401
from d2o.students.base import Student
from d2o.teachers.base import Teacher

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.workers"])


def _command(arguments: list[str], log: str, pause: float, die_in: str, die_at: int) -> None:
    """Run `d2o ARGUMENTS`, sleeping `pause` seconds at each network call; kill -9 oneself in the `die_at`-th call of `die_in`."""
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    app.console.out.file = app.console.err.file = sys.stdout
    calls = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    def slow(function):
        def wrapped(*args, **kwargs):
            time.sleep(pause)
            return function(*args, **kwargs)

        return wrapped

    Teacher.sample, Student.forward = slow(Teacher.sample), slow(Student.forward)
    if die_in == "compute":
        Teacher.sample, Student.forward = dying(Teacher.sample), dying(Student.forward)
    elif die_in == "replace":  # a whole file lies there under its temporary name
        os.replace = dying(os.replace)
    elif die_in == "record":  # the file is there, but not in the manifest
        WorkFolder.add = dying(WorkFolder.add)
    app.main(arguments)


def start(arguments: list, log: Path, pause: float = 0.0, die_in: str = "", die_at: int = 1):
    """Begin `d2o ARGUMENTS` in a process of its own; its output goes to `log`."""
    process = CONTEXT.Process(target=_command, args=([str(a) for a in arguments], str(log), pause, die_in, die_at))
    process.start()
    return process


def finish(process, seconds: float = 60) -> int:
    """Wait for the process; its exit code (negative: killed by that signal)."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the process did not end")
    return process.exitcode


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in the folder, by relative name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found
