"""What a long command needs from the process it runs in: a polite stop, and its place among several workers. No torch here."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


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
    """Within the block the first SIGINT or SIGTERM only raises a flag, so that the step in hand can finish; the second acts as usual."""
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
    """Whether `d2o --trust` was said: digests of files that d2o wrote are not looked at. In the environment, so that child processes know."""
    return os.environ.get(TRUST, "") not in ("", "0")
