"""Commands in forked children: torch and d2o are imported once, a trial then costs milliseconds instead of seconds.

The parent must never compute with torch: a pool of OpenMP threads does not survive a fork. Whatever computes, does it
in a child.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CRASHED = 70  # an exception that d2o's own `main` let through


@dataclass
class Outcome:
    """How a child ended: its exit code, or the signal that ended it (a time-out is a SIGKILL of ours). `peak`: MB of
    memory."""

    code: int | None
    signal: int
    timed_out: bool
    seconds: float
    peak: float
    text: str

    @property
    def brief(self) -> str:
        if self.timed_out:
            return f"no end after {self.seconds:.0f} s"
        return f"signal {self.signal}" if self.signal else f"exit {self.code}"


def warm(long: bool = False) -> None:
    """Import everything that the commands import, with one thread, before the first fork. `long`: also what takes
    seconds to import."""
    import torch

    torch.set_num_threads(1)
    import torch._dynamo
    import torch.utils.tensorboard
    from PIL import Image
    from tensorboard.backend.event_processing import event_accumulator  # noqa: F401

    from d2o.cli import app, eval_run, export, pairs, plan, sample, sweep, teachers, train_run  # noqa: F401
    from d2o.data import images, pair_tools, prompts  # noqa: F401
    from d2o.evaluation import results, run  # noqa: F401
    from d2o.export import exporter  # noqa: F401
    from d2o.methods.base import METHODS, get_method
    from d2o.recipes import load  # noqa: F401
    from d2o.reports import formats, report  # noqa: F401
    from d2o.students import consistency, generate, multistep, style  # noqa: F401
    from d2o.training import loop, setup  # noqa: F401

    for method in METHODS:
        get_method(method)
    Image.init()
    if long:
        from d2o.interop import torchvision_compat

        torchvision_compat.ensure()
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import pyarrow.parquet  # noqa: F401
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    gc.freeze()  # no child walks through, and so copies, what is there now


def d2o(arguments: list[str]) -> Callable[[], None]:
    """The command as a function to be called in a child."""

    def command() -> None:
        from d2o.cli.app import main

        main(arguments)

    return command


def run(
    function: Callable[[], Any],
    *,
    cwd: Path,
    log: Path,
    seconds: float = 60,
    kill_after: float | None = None,
    polite: bool = False,
    memory: int | None = None,
) -> Outcome:
    """Call `function` in a child and wait. `kill_after`: SIGKILL (`polite`: SIGTERM) after that many seconds; `memory`:
    bytes that it may take beyond what is in use now."""
    started = time.perf_counter()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(function, cwd, log, memory)
    limit = seconds if kill_after is None else min(kill_after, seconds)
    ended = _wait(pid, limit)
    timed_out = not ended and (kill_after is None or kill_after > seconds)
    if not ended and polite:
        os.kill(pid, signal.SIGTERM)
        ended = _wait(pid, seconds)
        timed_out = not ended
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    took = time.perf_counter() - started
    died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    return Outcome(
        code, died, timed_out, took, usage.ru_maxrss / 1024, log.read_text(errors="replace") if log.exists() else ""
    )


def _wait(pid: int, seconds: float) -> bool:
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(max(0, seconds) * 1000))
    finally:
        os.close(handle)


def _child(function: Callable[[], Any], cwd: Path, log: Path, memory: int | None) -> None:
    code = CRASHED
    atexit._clear()  # what the parent wants done at its own end
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        stream = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stdout = sys.stderr = stream
        os.chdir(cwd)
        os.environ.update(D2O_HOME=str(cwd / "home"), PWD=str(cwd))
        if memory is not None:
            limit = memory + _in_use()
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        function()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:  # what an interpreter does at its end
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _in_use() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def share(jobs: int, count: int, work: Callable[[int], dict[str, Any]], folder: Path) -> Iterator[dict[str, Any]]:
    """work(0) ... work(count - 1), each in one of `jobs` forked workers, which take the next number when they are free;
    results in any order."""
    folder.mkdir(parents=True, exist_ok=True)
    following = multiprocessing.get_context("fork").Value("i", 0)
    pids, files = [], [folder / f"results-{job}.jsonl" for job in range(jobs)]
    sys.stdout.flush()
    for file in files:
        file.write_text("")
        if (pid := os.fork()) == 0:
            code = 1
            try:
                with file.open("a") as out:
                    while (number := _take(following)) < count:
                        out.write(json.dumps(work(number)) + "\n")
                        out.flush()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    running = list(pids)
    streams = [file.open() for file in files]
    begun = [""] * jobs  # a line that is not whole yet
    while True:
        ended = not running  # looked at once more after the last has ended
        for i, stream in enumerate(streams):
            *whole, begun[i] = (begun[i] + stream.read()).split("\n")
            yield from (json.loads(line) for line in whole)
        if ended:
            return
        time.sleep(0.1)
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                if status:
                    raise RuntimeError(
                        f"a worker of the harness itself ended with status {status}; its traceback is above"
                    )


def _take(following: Any) -> int:
    with following.get_lock():
        following.value += 1
        return following.value - 1
