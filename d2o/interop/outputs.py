"""Whether something can be written at a path, found out before the work whose result goes there."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from d2o.errors import UserError
from d2o.interop.inputs import kind_of
from d2o.interop.safetensors_io import write_error


def check_output(path: str | os.PathLike[str], folder: bool | None = None) -> None:
    """UserError unless a file (`folder`: a folder; None: either) can be written at `path`; what is missing above it will be made.

    A file is written there and removed again: neither permission bits nor `access` tell of a read-only file system, a name that is too long
    for it, or what root may not do either. What may be overwritten is for the caller to say.
    """
    path = Path(path)
    above = path.absolute().parent
    try:
        _check_kind(path, folder)
        while not above.exists():
            if above.is_symlink():
                raise UserError(f"cannot write {path}: {above} is a link to nothing", "mend the link, or choose another place")
            _check_name(above)
            above = above.parent
        if not above.is_dir():
            raise UserError(f"cannot write {path}: {above.name} is a file")
        _try(path if path.is_dir() else above, path.name)
    except OSError as error:
        raise UserError(write_error(path, error).message, "choose another place") from error
    except ValueError as error:  # a zero byte
        raise UserError(f"cannot write {str(path)!r}: {error}") from error


def _check_kind(path: Path, folder: bool | None) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"cannot write {path}: it is a link to nothing ({os.readlink(path)})", "remove the link, or make what it points to")
    if not path.exists():
        return
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        if folder is False:
            raise UserError(f"cannot write {path}: a folder of that name is in the way")
    elif not stat.S_ISREG(mode):
        raise UserError(f"cannot write {path}: it is {kind_of(mode)}")
    elif folder:
        raise UserError(f"{path} is a file; expected a folder", "choose another --out")


def _check_name(path: Path) -> None:
    """OSError: a folder of that name cannot be made."""
    if len(os.fsencode(path.name)) > 255:
        raise OSError(36, "File name too long")


def _try(folder: Path, name: str) -> None:
    """Write as the atomic writers do: beside the file, under a longer name."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
    os.close(handle)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
