"""Where the command line writes: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from d2o.cli.hints import fit
from d2o.runtime import worker

if TYPE_CHECKING:
    from rich.progress import Progress

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
quiet = False
"""--quiet: only results and errors."""


def say(message: str) -> None:
    """One line about what is going on (stderr, first worker only)."""
    if worker()[0] == 0 and not quiet:
        err.print(escape(message))


LONGEST = 4000
"""Characters of a line of a message; what it quotes of a file may have no end."""


def error(message: str, hint: str = "") -> None:
    err.print(f"[bold red]error:[/] {escape(_cut(message))}")
    if hint := fit(hint):
        err.print("  " + escape(_cut(hint)).replace("\n", "\n  "))


def _cut(text: str) -> str:
    lines = text.split("\n")
    return "\n".join(
        line if len(line) <= LONGEST else f"{line[: LONGEST - 100]}... ({len(line):,} characters)" for line in lines
    )


def size(n: int) -> str:
    """Bytes, readable."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


class Meter:
    """Progress of a command: a live bar on a terminal, a line every few seconds elsewhere. The time that is left is
    shown from the second update on, as the mean rate since the first has it. Silent on all workers but the first, and
    under --quiet."""

    def __init__(self, title: str, total: int, unit: str = "images", done: int = 0):
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.start, self.first, self.printed = time.perf_counter(), done, time.perf_counter()
        self.quiet = quiet or worker()[0] != 0
        self.told = False
        self.progress: Progress | None = None
        if not self.quiet and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[note]}"),
            ]
            self.progress = Progress(*columns, console=err)
            self.task = self.progress.add_task(title, total=total, completed=done, rate="", left="", note="")
            self.progress.start()

    def update(self, done: int, note: str = "") -> None:
        """`done` units so far; `note` is shown behind (losses and the like)."""
        self.done = done
        now = time.perf_counter()
        rate = (done - self.first) / max(now - self.start, 1e-9)
        speed = f"{_speed(rate)} {self.unit}/s" if rate > 0 else ""
        left = f"ETA {_clock((self.total - done) / rate)}" if rate > 0 and done < self.total else ""
        if self.progress is not None:
            self.progress.update(self.task, completed=done, rate=speed, left=left, note=note)
        elif not self.quiet and (now - self.printed > 5 or done >= self.total or (left and not self.told)):
            self.printed, self.told = now, bool(left) or self.told
            text = ", ".join(filter(None, (f"{self.title} {done:,}/{self.total:,} {self.unit}", speed, left)))
            err.print(escape(f"{text}  {note}".rstrip()))

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _speed(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"


def _clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


@contextmanager
def meter(title: str, total: int, unit: str = "images", done: int = 0) -> Iterator[Meter]:
    bar = Meter(title, total, unit, done)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A callback progress(done, total, note) whose bar appears with the first call."""
    bars: list[Meter] = []

    def progress(done: int, total: int, note: str) -> None:
        if not bars:
            bars.append(Meter(title, total, unit, done))
        bars[0].update(done, note)

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()
