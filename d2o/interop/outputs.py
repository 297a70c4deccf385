"""Whether something can be written at a path, found out before the work whose result goes there."""

from __future__ import annotations

import errno
import glob
import os
import stat
from pathlib import Path

from d2o.errors import UserError
from d2o.inputs import special_kind
from d2o.interop.safetensors_io import write_error
from d2o.interop.temporary import sweep, temporary_file


def check_output(path: str | os.PathLike[str], folder: bool | None = None) -> None:
    """UserError unless a file (`folder`: a folder; None: either) can be written at `path`; what is missing above it
    will be made.

    A file is written beside `path` as the atomic writers do, and removed again: permission bits do not tell of a name
    that is too long, or of what root may not do either. What killed writers of it left goes. What may be overwritten is
    for the caller to say.
    """
    path = Path(path)
    above = path.absolute().parent
    try:
        _check_kind(path, folder)
        while not above.exists():
            if above.is_symlink():
                raise UserError(
                    f"cannot write {path}: {above} is a link to nothing", "mend the link, or choose another place"
                )
            _check_name(above)
            above = above.parent
        if not above.is_dir():
            raise UserError(f"cannot write {path}: {above.name} is a file")
        if path.is_dir():  # workers may be looking at what is in it
            if os.statvfs(path).f_flag & os.ST_RDONLY or not os.access(path, os.W_OK):
                raise OSError(errno.EROFS if os.access(path, os.W_OK) else errno.EACCES, "cannot be written")
        else:
            with temporary_file(above / path.name):
                sweep(above, glob.escape(path.name))
    except OSError as error:
        raise UserError(write_error(path, error).message, "choose another place") from error
    except ValueError as error:  # a zero byte
        raise UserError(f"cannot write {str(path)!r}: {error}") from error


def _check_kind(path: Path, folder: bool | None) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"cannot write {path}: it is a link to nothing ({os.readlink(path)})",
            "remove the link, or make what it points to",
        )
    if not path.exists():
        return
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        if folder is False:
            raise UserError(f"cannot write {path}: a folder of that name is in the way")
    elif not stat.S_ISREG(mode):
        raise UserError(f"cannot write {path}: it is {special_kind(mode)}")
    elif folder:
        raise UserError(f"{path} is a file; expected a folder", "choose another --out")


def _check_name(path: Path) -> None:
    """OSError: a folder of that name cannot be made."""
    if len(os.fsencode(path.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
