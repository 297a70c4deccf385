"""A run's log: metrics.jsonl (one JSON object a line) and TensorBoard events."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from d2o.interop.safetensors_io import atomic_write

_print_traceback = threading.excepthook


def _said_by_the_next_write(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own. What goes wrong there (a full disk) is raised again by the next write,
    and said there in one
    line: the thread prints no traceback before it."""
    if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
        _print_traceback(args)


class RunLog:
    """Appends records with `iteration` and `images`. A resumed run has done `iteration` iterations on `images` images:
    what an earlier process wrote after that is dropped, as it will be written again."""

    def __init__(self, folder: Path, iteration: int, images: int):
        from torch.utils.tensorboard import SummaryWriter

        path, board = folder / "metrics.jsonl", folder / "tensorboard"
        if path.exists():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _iteration(line) <= iteration]
            if kept != lines:
                atomic_write(path, "".join(kept))
        self.file = path.open("a")
        threading.excepthook = _said_by_the_next_write
        # Scalars are written at images. Where an earlier process has left some, those from the next image on are void.
        self.board = SummaryWriter(str(board), purge_step=images + 1 if board.exists() else None)

    def write(self, iteration: int, images: int, **values: object) -> None:
        self.file.write(json.dumps({"iteration": iteration, "images": images, **values}) + "\n")
        self.file.flush()
        for name, number in scalars_in(values):
            self.board.add_scalar(name, number, images)

    def sync(self) -> None:
        """Let the lines so far reach the disk, before a state does that comes after them."""
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()


def scalars_in(values: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """The numbers of a line of the log, those of a section by SECTION/NAME."""
    for name, value in values.items():
        for key, number in value.items() if isinstance(value, dict) else ((None, value),):
            if isinstance(number, (int, float)):
                yield name if key is None else f"{name}/{key}", number


def _iteration(line: str) -> float:
    """Of a line; infinite where it is none: the last one of a killed process may be cut short."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
