"""Processes that do d2o's work, to be killed. They are forked from a server that has imported torch once, which saves
seconds each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch

from d2o.cli import app, eval, export, pairs, sample, train  # noqa: F401  (so that the server has them)
from d2o.export import loaded  # noqa: F401
from d2o.students import generate  # noqa: F401
from d2o.students.base import Student
from d2o.teachers.base import Teacher
from d2o.work.folder import WorkFolder, fill
from d2o.work.remote import RemoteFolder

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.workers", "tests.training.kills", "tests.training.processes"])


def _command(
    arguments: list[str], log: str, pause: float, die_in: str, die_at: int, environment: dict[str, str]
) -> None:
    """Run `d2o ARGUMENTS` in that environment, sleeping `pause` seconds at each network call; kill -9 oneself in the
    `die_at`-th call of `die_in`."""
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    app.console.out.file = app.console.err.file = sys.stdout
    os.environ.update(environment)
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


def start(arguments: list, log: Path, pause: float = 0.0, die_in: str = "", die_at: int = 1, **environment: str):
    """Begin `d2o ARGUMENTS` in a process of its own; its output goes to `log`."""
    given = ([str(a) for a in arguments], str(log), pause, die_in, die_at, environment)
    process = CONTEXT.Process(target=_command, args=given)
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
    """Everything in the folder, by relative name, but for the workers' timing."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != "timing"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


# Several workers on one object store: fsspec's local file system, driven as if it were one.

TIMES = {"beat": 0.1, "expiry": 0.6, "settle": 0.02, "poll": 0.05}
REMOTE_MANIFEST = {"format": "test", "version": 1, "settings": {"seed": 3}, "files": []}


def fill_folder(folder, units, pause: float = 0.0, die_at: int = 0, say=lambda file: None) -> None:
    """Make each unit from its number alone, `pause` seconds for each; kill -9 oneself in the middle of the
    `die_at`-th."""
    made = 0

    def make(unit, done):
        nonlocal made
        made += 1
        say(unit.file)
        time.sleep(pause)
        if made == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.arange(unit.start, unit.start + unit.n, dtype=torch.float32) * 3

    def write(unit, values):
        return {
            "file": unit.file,
            "start": unit.start,
            "n": unit.n,
            **folder.save(unit.file, {"values": values}, {"start": unit.start}),
        }

    folder.open(REMOTE_MANIFEST)
    assert fill(folder, folder.order(units), make, write)
    folder.close()


def _remote_worker(path: str, units: list, pause: float, die_at: int, log: str) -> None:
    from fsspec.implementations.local import LocalFileSystem

    def say(file: str) -> None:
        with open(log, "a") as out:
            out.write(file + "\n")

    fill_folder(RemoteFolder(LocalFileSystem(), path, "test", "files", **TIMES), units, pause, die_at, say)


def start_remote(path: Path, units: list, log: Path, pause: float = 0.0, die_at: int = 0):
    """Begin `fill_folder` in a process of its own; the files it begins go to `log`, one a line."""
    process = CONTEXT.Process(target=_remote_worker, args=(str(path), units, pause, die_at, str(log)))
    process.start()
    return process
