"""A folder of an object store through fsspec, in the few operations that any of them has: list, read, put whole,
remove."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timezone
from pathlib import Path, PurePosixPath

from fsspec import AbstractFileSystem

from d2o.errors import UserError
from d2o.inputs import JsonObject

READERS = 16
"""Small objects that are fetched at the same time."""
BLOCK = 2**23
AGAIN = "check the address, the permissions and the network; then run again"


def whole_url(path: str | os.PathLike) -> str:
    """The path as text; a URL that went through `Path`, which makes s3:/bucket of s3://bucket, is restored."""
    text = os.fspath(path)
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1:///" if text.startswith("file:") else r"\1://", text)


def local_path(path: str | os.PathLike) -> str | None:
    """The path on this machine that a path or file:// URL means; None for any other URL."""
    protocol, colon, rest = whole_url(path).partition("://")
    if not colon:
        return protocol
    return rest if protocol in ("file", "local") else None


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """fsspec's file system for a URL, and the path in it. UserError: an unknown protocol, or its package is not
    installed."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        known = known_implementations.get(protocol, {})
        package = known.get("class", "").partition(".")[0]
        hint = known.get("err", str(error)) if package in ("", "fsspec") else f"pip install {package}"
        raise UserError(f"cannot use {url}: the package that speaks {protocol}:// is not installed", hint) from error
    except Exception as error:  # each backend has its own kinds
        raise UserError(f"cannot use {url}: {error}", "expected a path, or a URL such as s3://bucket/folder") from error


class Objects:
    """The folder `path` of `fs`; names are relative to it. Whatever goes wrong is a UserError that says which step, and
    what the backend said."""

    def __init__(self, fs: AbstractFileSystem, path: str, url: str | None = None):
        self.fs, self.path = fs, path.rstrip("/")
        self.url = (url or fs.unstrip_protocol(path)).rstrip("/")

    def ls(self, folder: str = "") -> dict[str, JsonObject]:
        """What is in the folder or in one below it, as fsspec describes it, by name; nothing if there is no such
        folder."""
        path = self._at(folder)
        with self._telling(f"read {self.url}/{folder}"):
            found = self._listing(path)
        items = {}
        for info in found:
            if self.fs._strip_protocol(info["name"]) != self.fs._strip_protocol(path):
                items[PurePosixPath(info["name"]).name] = info
            elif info.get("type") == "file" and info.get("size"):  # of no size: how some stores mark a folder
                raise UserError(
                    f"{self.url}/{folder}".rstrip("/") + " is a file; expected a folder", "choose another --out"
                )
        return items

    def read(self, name: str) -> bytes | None:
        """The object's content; None when there is no such object."""
        with self._telling(f"read {self.url}/{name}"):
            try:
                return self.fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """(name, content) in the order of `names`."""
        names = [*names]
        if names:
            with ThreadPoolExecutor(min(READERS, len(names)), "read") as readers:
                yield from zip(names, readers.map(self.read, names))

    def put(self, name: str, data: bytes) -> None:
        """Write the object whole, in place of an earlier one."""
        path = self._at(name)
        with self._telling(f"write {self.url}/{name}"):
            try:
                self.fs.pipe_file(path, data)
            except FileNotFoundError:
                # The folder is missing where folders are real. A missing bucket is a mistake: we make none.
                top = path[: path.index("/", 1)] if "/" in path[1:] else path
                if not self.fs.exists(top):
                    raise
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.fs.pipe_file(path, data)

    def remove(self, name: str) -> None:
        with self._telling(f"remove {self.url}/{name}"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._at(name))

    def remove_folder(self, folder: str) -> None:
        """Remove the empty folder, where folders are real."""
        with contextlib.suppress(Exception):  # not empty, or not supported: it does no harm
            self.fs.invalidate_cache(self._at(folder))
            if self.fs.isdir(self._at(folder)):
                self.fs.rmdir(self._at(folder))

    def modified(self, name: str) -> float | None:
        """When the object was written, in seconds by the store's clock; None when the store does not say, or the object
        is gone."""
        try:
            self.fs.invalidate_cache(self._at(name))
            when = self.fs.modified(self._at(name))
            return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()
        except Exception:  # what a file system raises that cannot tell is its own choice
            return None

    def fetch(self, name: str, path: Path) -> None:
        """Copy the object to a local file."""
        with self._telling(f"read {self.url}/{name}"):
            self.fs.get_file(self._at(name), str(path))

    def sha256(self, name: str) -> str:
        """Hex digest of the object's content."""
        digest = hashlib.sha256()
        with self._telling(f"read {self.url}/{name}"), self.fs.open(self._at(name), "rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _listing(self, path: str) -> list[JsonObject]:
        while True:
            self.fs.invalidate_cache(path)
            try:
                return self.fs.ls(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
            except KeyError:  # fsspec's memory file system, when an object goes while it lists them
                continue

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"cannot {what}: no such file or bucket", "check the address") from error
        except OSError as error:
            raise UserError(f"cannot {what}: {error.strerror or error or type(error).__name__}", AGAIN) from error
        except Exception as error:  # each backend has its own kinds
            raise UserError(f"cannot {what}: {error or type(error).__name__}", AGAIN) from error
