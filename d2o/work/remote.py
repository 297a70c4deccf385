"""A folder on an object store (s3://, gs://, anything fsspec knows) that any number of workers fill together.

An object store has no locks and no renaming, but it puts an object whole or not at all, and the content of a file is a
function of the folder's
settings alone: a file that two workers make is the same file. So claims (d2o/work/claims.py) need only make that rare.

A finished file is recorded by an object `entries/<file without suffix>.json`. `close` writes them all into
`manifest.json`, reads it back, and only then removes them. Whoever reads looks at the entries first and at the manifest
after: what has left the one is in the other. A finished folder holds the same bytes as a `WorkFolder` that one worker
filled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from fsspec import AbstractFileSystem
from torch import Tensor

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.download import home
from d2o.interop.safetensors_io import atomic_path, file_sha256, to_bytes
from d2o.interop.seal import check_against
from d2o.work.base import (
    MANIFEST,
    SHA256,
    TIMING,
    SharedFolder,
    Unit,
    content_sha256,
    dump_manifest,
    intact,
    note_file,
    read_notes,
)
from d2o.work.claims import CLAIMS, Claims, Held
from d2o.work.folder import WorkFolder
from d2o.work.objects import Objects, filesystem, local_path, whole_url

ENTRIES = "entries"
DIGEST = "entry_sha256"
"""Key of an entry's digest of its own content, in its object."""
IDENTITY = ("size", "ETag", "etag", "mtime", "created", "LastModified")
"""What file systems say of an object that changes when it is written again."""


def open_folder(path: str | os.PathLike, kind: str, entries: str) -> WorkFolder | RemoteFolder:
    """The folder at a path or file:// (a WorkFolder), or at any other fsspec URL (a RemoteFolder). Nothing is read or
    written yet.

    UserError: an unknown protocol, or one whose Python package is not installed.
    """
    if (local := local_path(path)) is not None:
        return WorkFolder(local, kind, entries)
    fs, root = filesystem(whole_url(path))
    return RemoteFolder(fs, root, kind, entries, url=whole_url(path))


class RemoteFolder(SharedFolder):
    """The folder `path` of `fs`, which must put files whole. Threads may share it.

    `beat`, `expiry`, `settle`: seconds, of the claims; `poll`: seconds between two looks when all that is left is
    claimed; `cache`: where `local` keeps what it fetched, by default `shards/` in d2o's home ($D2O_HOME).
    """

    def __init__(
        self,
        fs: AbstractFileSystem,
        path: str,
        kind: str,
        entries: str,
        url: str | None = None,
        *,
        beat: float = 30.0,
        expiry: float = 120.0,
        settle: float = 0.5,
        poll: float = 2.0,
        cache: str | Path | None = None,
    ):
        self.objects = Objects(fs, path, url)
        super().__init__(self.objects.url, kind, entries)
        self.claims = Claims(self.objects, beat, expiry, settle)
        self.settle, self.poll = settle, poll
        self.cache = Path(cache) if cache is not None else home() / "shards"
        self._known: dict[tuple[str, ...], JsonObject] = {}  # entry objects that need not be fetched again
        self._recorded: dict[str, JsonObject] = {}  # as `manifest` last saw it
        self._begun: JsonObject | None = None

    def manifest(self) -> JsonObject | None:
        entries = [entry for entry in self._entries().values() if entry]
        record = self._stored_manifest()
        if record is None:
            return None
        if self._begun is not None and _settings(record, self.entries) != self._begun:
            hint = "another worker began it at the same moment with other settings; run again"
            raise UserError(f"{self.url}/{MANIFEST} has changed meanwhile", hint)
        self._recorded = {entry["file"]: entry for entry in [*record[self.entries], *entries]}
        record[self.entries] = sorted(self._recorded.values(), key=lambda entry: entry["start"])
        return record

    def open(self, record: JsonObject) -> JsonObject:
        # Listed before the manifest is looked for: a worker that starts beside us writes the manifest before any other
        # file.
        names = set(self.objects.ls())
        manifest = self.manifest()
        if manifest is None:
            self._refuse(names - {MANIFEST, CLAIMS, ENTRIES, TIMING})
            self.objects.put(MANIFEST, dump_manifest(record).encode())
            time.sleep(self.settle)  # if another worker does the same, both go on with what was written last
            manifest = self.present()
        self._begun = _settings(manifest, self.entries)
        return manifest

    def add(self, entry: JsonObject) -> None:
        if self.recorded().get(entry["file"]) != entry:
            sealed = {**entry, DIGEST: content_sha256({"entry": entry})}
            self.objects.put(_entry_name(entry["file"]), json.dumps(sealed, sort_keys=True).encode())
            self._recorded[entry["file"]] = entry

    def change(self, how: Callable[[JsonObject], JsonObject]) -> JsonObject:
        """Without a lock: of workers that change it at the same moment the last one's change stays, and the others see
        that it does."""
        manifest = self.present()
        while (wanted := how(manifest)) != manifest:
            self.objects.put(MANIFEST, dump_manifest(wanted).encode())
            self._begun = None
            time.sleep(self.settle)
            manifest = self.present()
        self._begun = _settings(manifest, self.entries)
        return manifest

    def close(self, finished: Callable[[JsonObject], bool] = lambda manifest: True) -> None:
        entries, manifest = self._entries(), self.manifest()
        if manifest is None or not finished(manifest):
            return
        if entries:
            self.objects.put(MANIFEST, dump_manifest(manifest).encode())
            back = self._present_entries()
            for name, entry in entries.items():
                if entry is None or entry in back:
                    self.objects.remove(f"{ENTRIES}/{name}")
        self.objects.remove_folder(ENTRIES)
        self.claims.clear()

    def _stored_manifest(self) -> JsonObject | None:
        """`manifest.json` alone. Read twice before it is called damaged, for file systems that do not put it all at
        once."""
        if (data := self.objects.read(MANIFEST)) is None:
            return None
        with contextlib.suppress(UserError):
            return self.parse(data)
        time.sleep(self.settle)
        return self.parse(self.objects.read(MANIFEST) or b"")

    def _present_entries(self) -> list[JsonObject]:
        return (self._stored_manifest() or {self.entries: []})[self.entries]

    def _entries(self) -> dict[str, JsonObject | None]:
        """The entry objects by name; None for one that is damaged (its file will be looked at again)."""
        found = self.objects.ls(ENTRIES)
        keys = {name: (name, *(str(info.get(word)) for word in IDENTITY)) for name, info in found.items()}
        entries: dict[str, JsonObject | None] = {
            name: self._known[keys[name]] for name in found if keys[name] in self._known
        }
        for path, data in self.objects.read_many(f"{ENTRIES}/{name}" for name in found if name not in entries):
            if data is None:  # another worker has just moved it into the manifest
                continue
            name = PurePosixPath(path).name
            entry = entries[name] = _read_entry(path, data)
            if entry is not None:
                self._known[keys[name]] = entry
        return entries

    def claim(self, name: str) -> Held | None:
        return self.claims.claim(name)

    def order(self, units: list[Unit]) -> list[Unit]:
        """From a place of this worker's own onward, so that many workers that start together do not fight for the first
        unit."""
        first = int(random.Random(self.claims.worker).random() * len(units))
        return units[first:] + units[:first]

    def remove_temporary(self, name: str) -> None:
        """There is nothing of that kind."""

    def save(self, file: str, tensors: dict[str, Tensor], meta: JsonObject) -> JsonObject:
        data = to_bytes(tensors, meta)
        self.objects.put(file, data)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def local(self, file: str) -> Path:
        """Fetched once: the copy is kept under the content's checksum. A file that is not recorded is fetched each
        time."""
        if file not in self._recorded:
            self.manifest()
        entry = self._recorded.get(file, {})
        size, sha256 = entry.get("bytes"), entry.get("sha256")
        copy = (
            self.cache
            / hashlib.sha256(self.url.encode()).hexdigest()[:16]
            / (f"{sha256[:16]}-{file}" if sha256 else file)
        )
        if sha256 and copy.exists() and copy.stat().st_size == size and check_against(copy, sha256):
            return copy
        with atomic_path(copy) as temporary:
            self.objects.fetch(file, temporary)
            came, expected = temporary.stat().st_size, self.size(file) if size is None else size
            if came != expected:
                raise UserError(
                    f"{self.url}/{file} has {came} bytes instead of {expected}", "make it again, or check the network"
                )
            if sha256 and file_sha256(temporary) != sha256:
                raise UserError(
                    f"{self.url}/{file}: its checksum differs from the manifest's",
                    "make it again, or check the network",
                )
        return copy

    def sha256(self, file: str) -> str:
        return self.objects.sha256(file)

    def sizes(self, files: Iterable[str]) -> dict[str, int]:
        files = list(files)
        found = self.objects.ls() if files else {}
        return {
            file: int(found[file]["size"]) if file in found and found[file].get("type") != "directory" else -1
            for file in files
        }

    def note(self, name: str, record: JsonObject) -> None:
        with contextlib.suppress(UserError):
            self.objects.put(note_file(name), (json.dumps(record, sort_keys=True) + "\n").encode())

    def notes(self) -> list[JsonObject]:
        contents = self.objects.read_many(f"{TIMING}/{name}" for name in sorted(self.objects.ls(TIMING)))
        return read_notes(data for _, data in contents if data is not None)


def _settings(record: JsonObject, entries: str) -> JsonObject:
    """The manifest without its list of files: what does not change while the folder is filled, but for the number of
    samples, which may grow."""
    rest = {name: value for name, value in record.items() if name != entries}
    return {**rest, "settings": {**rest["settings"], "n": None}} if isinstance(rest.get("settings"), dict) else rest


def _entry_name(file: str) -> str:
    return f"{ENTRIES}/{PurePosixPath(file).with_suffix('.json').name}"


def _read_entry(name: str, data: bytes) -> JsonObject | None:
    """The entry in these bytes; None unless it is whole and belongs under that name."""
    try:
        entry = json.loads(data)
        digest = entry.pop(DIGEST, None)  # that of an older d2o has none
        whole = (
            all(isinstance(entry[key], int) for key in ("start", "n", "bytes")) and _entry_name(entry["file"]) == name
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return entry if whole and intact({"entry": entry, **({} if digest is None else {SHA256: digest})}) else None
