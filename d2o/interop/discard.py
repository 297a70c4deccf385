"""Removing a folder as one step: it is renamed first, so that a kill in between never leaves half of it under its own
name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path

from d2o.interop.temporary import SUFFIX


def discard(folder: Path) -> None:
    """Remove `folder` and all that is in it; nothing where there is none. What a kill leaves has a temporary name,
    `.<name>.<random>.tmp`, and is locked as those are while its remover lives (`d2o.interop.temporary`), so that the
    next start sweeps it."""
    gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):  # another worker did it
            os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
    finally:
        os.close(handle)
