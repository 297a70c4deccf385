"""A run's folder while a process works in it: locked against a second one, and free of what killed ones left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from d2o.errors import UserError
from d2o.interop.safetensors_io import write_error
from d2o.interop.temporary import sweep


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be, for this process. The folder itself is locked (flock): no file is left
    that tells of it, and a killed process frees it. Folders that were made and stay empty go again. UserError: another
    process holds it, or it cannot be made."""
    with contextlib.ExitStack() as after:
        while True:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # another process took its empty folder away between the two
                continue
            except OSError as error:
                raise write_error(folder, error) from error
            after.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                hint = "wait for its end, or choose another --out"
                raise UserError(f"another process is training in {folder}", hint) from error
            except OSError:  # a file system without locks
                pass
            if _is_still(folder, handle):
                after.callback(_remove_empty, made)
                break
        yield


def _is_still(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(handle))
    except FileNotFoundError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: it is used
            folder.rmdir()


def tidy(folder: Path) -> None:
    """Remove what killed processes left in a run's folder: temporary files, shares of an evaluation. The caller holds
    it."""
    for place, names in (
        (folder, "recipe.yaml"),
        (folder, "metrics.jsonl"),
        (folder / "checkpoints", "*"),
        (folder / "previews", "*"),
    ):
        sweep(place, names)
    shutil.rmtree(folder / "evaluation", ignore_errors=True)


def drop_previews(folder: Path, images: int) -> None:
    """Remove the grids of iterations that will run again."""
    for path in (folder / "previews").glob("*.png"):
        if path.stem.isdigit() and int(path.stem) > images:
            path.unlink()
