"""The threads that all sets of images share, to decode files and to resize."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

_pool: tuple[int, ThreadPoolExecutor] | None = None
_pool_lock = threading.Lock()


def _workers() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(32, cpus)


def map_threads(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """[function(item) for item in items] on the threads all sets share, in pieces, because an item may take only
    microseconds."""
    global _pool
    items = list(items)
    if len(items) < 4:
        return [function(item) for item in items]
    with _pool_lock:
        if _pool is None or _pool[0] != os.getpid():  # threads do not survive a fork
            _pool = os.getpid(), ThreadPoolExecutor(_workers(), "d2o-images")
        threads = _pool[1]
    piece = max(1, min(256, len(items) // (2 * _workers())))
    pieces = [items[i : i + piece] for i in range(0, len(items), piece)]
    done = threads.map(lambda part: [function(item) for item in part], pieces)
    return [result for part in done for result in part]
