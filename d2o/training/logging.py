"""A run's log: metrics.jsonl (one JSON object a line) and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RunLog:
    """Appends records with `iteration` and `images`. On resume, lines after `iteration` are dropped: they will be written again."""

    def __init__(self, folder: Path, iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["iteration"] <= iteration:
                        kept.append(line + "\n")
                except (ValueError, KeyError):  # the last line of a killed process may be cut short
                    continue
        self.path.write_text("".join(kept))
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1 if iteration else None)

    def write(self, iteration: int, images: int, **values: Any) -> None:
        self.file.write(json.dumps({"iteration": iteration, "images": images, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            for key, number in value.items() if isinstance(value, dict) else ((None, value),):
                if isinstance(number, (int, float)):
                    self.board.add_scalar(name if key is None else f"{name}/{key}", number, images)

    def close(self) -> None:
        self.file.close()
        self.board.close()
