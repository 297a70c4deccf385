"""What a long command needs from the process it runs in: a polite stop, its place among several workers, and not to be
in the others' way. No torch here."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import tempfile
from collections.abc import Callable, Iterator

Say = Callable[[str], None]
"""Where a long command's news go: a line at a time."""


class Stopped(Exception):
    """A command was asked to stop (SIGINT, SIGTERM), has saved its work, and says how to go on (`way`)."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT, way: str = ""):
        super().__init__(message)
        self.message, self.exit_code, self.way = message, 128 + signal_number, way


class StopFlag:
    """`received` is the signal's number once SIGINT or SIGTERM came, else 0."""

    received: int = 0

    def __bool__(self) -> bool:
        return self.received != 0


@contextlib.contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Within the block the first SIGINT or SIGTERM only raises a flag, so that the step in hand can finish; the second
    acts as usual."""
    flag = StopFlag()
    previous: dict[int, object] = {}

    def handler(number: int, frame: object) -> None:
        flag.received = number
        for known, old in previous.items():
            signal.signal(known, old)  # type: ignore[arg-type]

    for wanted in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread: leave the signals alone
            previous[wanted] = signal.signal(wanted, handler)
    try:
        yield flag
    finally:
        for known, old in previous.items():
            signal.signal(known, old)  # type: ignore[arg-type]


def worker() -> tuple[int, int]:
    """(rank, number of workers) as torchrun sets them; (0, 1) outside it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


TRUST = "D2O_TRUST"


def trusting() -> bool:
    """Whether `d2o --trust` was said: digests of files that d2o wrote are not looked at. In the environment, so that
    child processes know."""
    return os.environ.get(TRUST, "") not in ("", "0")


SPINS = "1000"
"""Turns (some ten microseconds) that an idle OpenMP thread waits for its next work before it sleeps. libgomp's own
number is 300,000: threads that wait for one that is not running keep the cores from it for milliseconds, so that two
processes on one machine slow each other many times. Longer than the gaps between the operations of a network: with none
at all a process alone on its machine loses up to 40 % (measured)."""


def share_cores() -> None:
    """Let idle threads make way for other processes, at once where another d2o is at work on this machine as this one
    starts. Before torch is imported, which reads this once; what the user chose stands."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS if _alone() else "0"  # libgomp, which torch ships on Linux
        os.environ["KMP_BLOCKTIME"] = "0"  # Intel's and LLVM's, in milliseconds (200)


def _alone() -> bool:
    """Whether no other d2o process of this user lives on this machine. Each holds a lock on a file of its own until it
    ends, however it ends."""
    with contextlib.suppress(OSError):
        folder = os.path.join(tempfile.gettempdir(), f"d2o-{os.getuid()}")
        os.makedirs(folder, mode=0o700, exist_ok=True)
        mine = f"{os.getpid()}.lock"
        handle = os.open(os.path.join(folder, mine), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held.append(handle)
        return not any([_lives(os.path.join(folder, name)) for name in os.listdir(folder) if name != mine])
    return True


_held: list[int] = []


def _lives(path: str) -> bool:
    """Whether the process whose file this is lives; that of a dead one goes."""
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
    return False
