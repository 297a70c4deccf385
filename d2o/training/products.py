"""The checkpoints of a run's product (`last`, `best`, `images-<n>`), and how they stay in step with its state, whatever
kills the process.

The state is the one thing that counts: its record names every checkpoint that belongs to it, with the sha256 of the
file. What is done, in order:

    1. best.safetensors.next                                 `put`, whenever an evaluation is better
    2. last.safetensors.next, images-<n>.safetensors.next    `put`, when the state is to be saved
    3. state.safetensors, by one rename                      the commit: names the files of 1 and 2 by their digests
    4. each x.safetensors.next -> x.safetensors              `publish`
    5. snapshots that the state does not name are removed    `publish`

Killed before 3, in the middle of a file or between two: the old state stands, and so do its checkpoints, since nothing
but `.next` files was written. Opening the run (`settle`) removes these: the old state names no digest of theirs. The
iterations since then run again and write the same again. Killed after 3: all that the new state names is on the disk,
under one of two names. `settle` finds each by its digest, and does what is left of 4 and 5; killed in that, the next
one does. So after `settle` the folder is a function of the state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import file_sha256, read_meta, save_file

SNAPSHOTS = "images-*.safetensors"
NEXT = ".next"


def snapshot(images: int) -> str:
    """Name of the numbered checkpoint after so many images; in the order of the names is that of the numbers."""
    return f"images-{images:012d}"


class Products:
    """The checkpoints in a folder. `digests`: name -> sha256 of those that belong to the state, or to the next one."""

    def __init__(self, folder: Path, digests: Mapping[str, str] | None = None):
        self.folder, self.digests = folder, dict(digests or {})

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def put(self, name: str, tensors: dict[str, Tensor], meta: JsonObject) -> None:
        """Write a checkpoint that becomes visible with the next state."""
        self.digests[name] = save_file(self._next(name), tensors, meta)

    def keep(self, newest: int) -> None:
        """Forget all but so many of the numbered ones; `publish` removes them."""
        names = sorted(name for name in self.digests if name.startswith("images-"))
        for name in names[: max(len(names) - newest, 0)]:
            del self.digests[name]

    def publish(self) -> None:
        """The state has been saved with these digests: let the folder show what it names."""
        for path in sorted(self.folder.glob(f"*.safetensors{NEXT}")):
            os.replace(path, path.with_suffix(""))
        self._drop_snapshots()

    def settle(self) -> list[str]:
        """Finish what a killed process had begun, and undo what it had not committed. Returns the names of checkpoints
        that are there neither finished nor pending: somebody removed or changed them."""
        missing = []
        for name, digest in self.digests.items():
            if _is(self._next(name), digest):
                os.replace(self._next(name), self.path(name))
            elif not _is(self.path(name), digest):
                missing.append(name)
        for path in self.folder.glob(f"*.safetensors{NEXT}"):
            path.unlink()
        self._drop_snapshots()
        return missing

    def adopt(self, images: int) -> list[str]:
        """`settle` for the state of an older d2o, which names no checkpoints and was saved after `images`: those in the
        folder are taken as its own, but for a `last` that was not written with it."""
        for path in [self.path("best"), *self.folder.glob(SNAPSHOTS)]:
            if path.exists():
                self.digests[path.stem] = file_sha256(path)
        last = self.path("last")
        if last.exists() and read_meta(last).get("images") == images:
            self.digests["last"] = file_sha256(last)
            return []
        return ["last"]

    def _next(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors{NEXT}"

    def _drop_snapshots(self) -> None:
        for path in self.folder.glob(SNAPSHOTS):
            if path.stem not in self.digests:
                path.unlink()


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest
