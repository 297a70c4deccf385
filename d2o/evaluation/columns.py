"""What was measured of n images, one row an image: columns in memory, or in a folder that processes fill together and a
kill leaves usable.

A column is named `extractor/output` ("inception/features"), or for what it holds ("labels"). Rows come in chunks of
fixed images, always in the same order, so what is computed from them depends neither on the number of processes nor on
interruptions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import load_file, read_meta
from d2o.interop.temporary import sweep
from d2o.runtime import trusting
from d2o.work.folder import Unit, WorkFolder, cut

KIND = "d2o-eval-columns"


class Columns(ABC):
    """`n` rows; `seconds` of generating each full batch of `batch` images, where images were generated."""

    n: int
    batch: int
    seconds: list[float]

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def blocks(self, name: str) -> Iterator[Tensor]:
        """The column's chunks [k, ...], in the order of the images."""

    def column(self, name: str) -> Tensor:
        """The whole column [n, ...]; filled in place, so that it exists once in memory."""
        out: Tensor | None = None
        at = 0
        for block in self.blocks(name):
            if out is None:
                out = block.new_empty(self.n, *block.shape[1:])
            out[at : at + len(block)] = block
            at += len(block)
        if out is None:
            raise KeyError(name)
        return out

    def mean(self, name: str) -> float:
        """The mean of a column [n], in float64."""
        return float(sum(float(block.double().sum()) for block in self.blocks(name)) / self.n)


class MemoryColumns(Columns):
    """Columns in memory, for scores that are taken on the way."""

    def __init__(self, n: int, batch: int):
        self.n, self.batch, self.seconds = n, batch, []
        self.parts: list[dict[str, Tensor]] = []

    def names(self) -> list[str]:
        return list(self.parts[0]) if self.parts else []

    def blocks(self, name: str) -> Iterator[Tensor]:
        return (part[name] for part in self.parts)


class FolderColumns(Columns):
    """Columns in a finished work folder. `checked`: files whose digest this process has looked at, or written.

    UserError: a chunk whose bytes are not those that were written.
    """

    def __init__(self, folder: WorkFolder, units: Sequence[Unit], n: int, batch: int, checked: Container[str] = ()):
        self.folder, self.units, self.n, self.batch = folder, list(units), n, batch
        recorded = folder.recorded()
        for unit in self.units:
            if unit.file not in checked and not column_intact(folder, recorded[unit.file]):
                raise UserError(
                    f"{folder.path / unit.file} is damaged: its bytes are not those that were written",
                    "the same command makes it again",
                )
        self.seconds = [s for unit in self.units for s in read_meta(folder.path / unit.file)["seconds"]]

    def names(self) -> list[str]:
        return sorted(self._part(self.units[0]))

    def blocks(self, name: str) -> Iterator[Tensor]:
        return (self._part(unit, name)[name] for unit in self.units)

    def _part(self, unit: Unit, name: str | None = None) -> dict[str, Tensor]:
        path = self.folder.path / unit.file
        if name is None:
            return load_file(path)[0]
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name)}


def begin(path: Path, record: JsonObject) -> WorkFolder:
    """Begin or join the folder of a pass. What killed writers left in it goes."""
    sweep(path)
    folder = WorkFolder(path, KIND, "parts")
    folder.open({"format": KIND, "version": 1, "record": record, "parts": []})
    return folder


def chunks(n: int, size: int) -> list[Unit]:
    """The files of a pass over n images."""
    return cut(n, size, "part-{:06d}.safetensors")


def column_intact(folder: WorkFolder, entry: JsonObject) -> bool:
    """Whether the file has the bytes that were written. UserError: it cannot be read."""
    return trusting() or folder.sha256(entry["file"]) == entry["sha256"]


def join_columns(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several batches one after the other, contiguous and on the CPU."""
    return {name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]}
