"""Fetches a published file once, safely: it continues where it stopped, checks what came, and never leaves a broken
file under a whole one's name.

Beside `NAME` stand, while it is on its way, `NAME.part` and `NAME.part.json` (of which file on the server it is a
part), and afterwards
`NAME.json`: {"url", "sha256", "bytes", "date", "checked"}. `checked`: the sha256 was known beforehand; else it was
first seen on that date, and whatever is read or downloaded later must have the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.content import check_content
from d2o.interop.part_file import PartFile, feed, read_object
from d2o.interop.safetensors_io import atomic_write, write_error
from d2o.interop.transfer import Received, failed, fetch_fsspec, fetch_http

LOCAL = ("file", "local", "memory")
"""Protocols that need no network."""


def home() -> Path:
    """Where d2o keeps what it downloads: `$D2O_HOME`, else `$XDG_CACHE_HOME/d2o`, else `~/.cache/d2o`."""
    if named := os.environ.get("D2O_HOME"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "d2o"


def offline() -> str | None:
    """The setting that forbids the network ("D2O_OFFLINE=1" or "HF_HUB_OFFLINE=1"), or None."""
    for name in ("D2O_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on"):
            return f"{name}={os.environ[name]}"
    return None


def download(
    url: str,
    path: str | os.PathLike,
    sha256: str | None = None,
    size: int | None = None,
    progress: Received | None = None,
) -> Path:
    """Fetch `url` to `path`, or find it there; any number of processes may ask for the same file at once.

    http(s) is continued where it stopped; other protocols (s3://, file://, ...) go through fsspec. UserError: no
    network, refused, not there, disk full, or not the expected file (`sha256`, `size` in bytes); it says where to put a
    file that was fetched by other means.
    """
    path = Path(path)
    if path.exists():
        return verify_file(path, sha256, size)
    protocol = url.partition("://")[0].lower() if "://" in url else "file"
    if (setting := offline()) and protocol not in LOCAL:
        raise failed(url, path, f"the network is switched off ({setting})", again=False)
    with _locked(path):
        if path.exists():  # another process was faster
            return verify_file(path, sha256, size)
        with PartFile(path, url, sha256 is not None) as part:
            (fetch_http if protocol in ("http", "https") else fetch_fsspec)(part, url, path, size, progress)
            _check(part, url, path, sha256)
            part.finish()
        record = {"url": url, "sha256": part.digest.hexdigest(), "bytes": part.position, "checked": sha256 is not None}
        atomic_write(
            _beside(path),
            json.dumps(record | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}, indent=1) + "\n",
        )
    return path


def verify_file(path: str | os.PathLike, sha256: str | None = None, size: int | None = None) -> Path:
    """The path, if the file there is the one that was published, or (where that is not known) the one that was
    downloaded.

    A file that a user put there is only held against `sha256` and `size`. UserError: missing, or another file. Reads
    the whole file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is {'a folder; expected a file' if path.is_dir() else 'missing'}")
    record = download_record(path) or {}
    # Somebody who replaces a file whose hash nobody published also removes its record; the message says so.
    hint = (
        f"remove {path} and run again"
        if sha256
        else f"remove {path} and run again; if it is right, remove {_beside(path).name} instead"
    )
    expected_size = size if size is not None else record.get("bytes")
    found = path.stat().st_size
    if expected_size is not None and found != expected_size:
        raise UserError(f"{path} is damaged or another file: it has {found:,} bytes, expected {expected_size:,}", hint)
    expected = (sha256 or record.get("sha256") or "").lower()
    if expected:
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                feed(digest, file)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        if digest.hexdigest() != expected:
            raise UserError(
                f"{path} is damaged or another file: sha256 {digest.hexdigest()}, expected {expected}", hint
            )
    return path


def download_record(path: str | os.PathLike) -> JsonObject | None:
    """What was written down when `path` was downloaded, or None: it was not, or the record is no JSON. UserError: it
    has been changed."""
    beside = _beside(Path(path))
    record = read_object(beside)
    if record is not None:
        sound = (
            isinstance(record.get("sha256"), str)
            and re.fullmatch("[0-9a-fA-F]{64}", record["sha256"])
            and type(record.get("bytes")) is int
        )
        if not sound or not isinstance(record.get("url"), str):
            raise UserError(
                f"{beside} is not the record of a download",
                "remove it: the file beside it counts as put there by hand then",
            )
    return record


def _check(part: PartFile, url: str, path: Path, sha256: str | None) -> None:
    """UserError, and the part is gone, unless it has the published sha256, or the one that the same URL gave before;
    where neither is known, unless it is whole and of the kind that its name says."""
    earlier = download_record(path) or {}
    seen = None if sha256 or earlier.get("url") != url else earlier.get("sha256")
    expected = (sha256 or seen or "").lower()
    if not expected:
        try:
            check_content(part.path, path.name)
        except (ValueError, OSError) as error:
            part.discard()
            raise failed(url, path, f"{part.position:,} bytes came, and {error}", again=False) from error
        return
    if part.digest.hexdigest() == expected:
        return
    part.discard()
    what = f"what {url} gave is not the expected file: sha256 {part.digest.hexdigest()}, expected {expected}"
    if seen:
        hint = (
            f"it gave that file on {earlier.get('date')}; if the new one is right, remove {_beside(path)} and run again"
        )
    else:
        hint = f"run again; if it stays so, get the right file by other means and put it at {path}"
    raise UserError(what, hint)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time; the kernel frees the lock of a killed one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise UserError(write_error(path, error).message, "set D2O_HOME to a folder that can be written") from error
    try:
        yield
    finally:
        lock.release()
