"""Which layout a path has, and the list it stands for: images with their labels, whatever holds them.

Accepted: a folder, a zip, a WebDataset tar or its shards, an LMDB, an npz, CIFAR-10 as its authors packed it, and
scikit-learn's digits as `real:digits`. Labels, in this order:
1. `dataset.json` as EDM writes it: {"labels": [["00000/img00000000.png", 6], ...]}, or {"labels": null} for an
   unlabelled set;
2. in a tar, a `key.cls` (a number) or `key.json` (its "label") beside `key.png`;
3. sub-folders: each is a class, numbered in plain order of the names.
An archive of a folder is read like the folder: one directory that holds everything else is looked through.

Images are in plain (not numeric: "10" < "9") order of their paths without suffix, so that the set does not depend on
the container or the file system.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import os
import posixpath
import re
from collections.abc import Iterable

from PIL import Image

from d2o.data import decode
from d2o.data.arrays import Arrays, open_cifar, open_npz
from d2o.data.containers import ArchiveMember, Container, FolderContainer, TarContainer, ZipContainer
from d2o.data.layouts import LAYOUTS, MAX_CLASSES, ImageSource, Reason, read_label
from d2o.data.lmdb_files import LmdbFiles, is_lmdb
from d2o.data.synthetic.digits import digits
from d2o.errors import MissingImages, UserError, unknown
from d2o.inputs import JsonObject, check_input, json_object, parse_json

REAL = ("real:digits", "real:digits/a", "real:digits/b")
SIDE_SUFFIXES = {
    ".json",
    ".jsonl",
    ".txt",
    ".md",
    ".rst",
    ".csv",
    ".tsv",
    ".yaml",
    ".yml",
    ".html",
    ".xml",
    ".log",
    ".db",
    ".ini",
}
SIDE_NAMES = {"readme", "license", "licence", "copying", "changelog", "makefile", "icon\r"}

_ODD = {".mdb": "an LMDB: unpack it, and give the folder that it lies in", ".tfrecords": "TFRecords are not read"}


class Files(ImageSource):
    """Images in a container. The fingerprint covers names, sizes in bytes and labels, not the bytes themselves."""

    suffixes: tuple[str, ...] = decode.SUFFIXES

    def __init__(self, container: Container):
        self._container = container
        self.bad, self.notes = list(container.bad), list(container.notes)
        images, fields = self._sort_out(container.members)
        labels, self.class_names, problems = self._label(images, fields)
        self.bad += [(images[i].name, why) for i, why in problems.items()]
        stamp = hashlib.sha256()
        for i, member in enumerate(images):
            stamp.update(
                f"{member.name}\0{member.size}\0{labels[i] if labels and i not in problems else '-'}\n".encode()
            )
        self._fingerprint = stamp.hexdigest()
        good = [i for i in range(len(images)) if i not in problems]
        self._members = [images[i] for i in good]
        self.names = [member.name for member in self._members]
        self.labels = None if labels is None else [labels[i] for i in good]

    def head(self, index: int) -> decode.ImageHead:
        return decode.read_head(functools.partial(self._container.read, self._members[index]))

    def picture(self, index: int) -> Image.Image:
        return decode.open_picture(self._container.read(self._members[index]))

    def keep(self, count: int) -> None:
        super().keep(count)
        self._members = self._members[:count]

    def _found(self) -> str:
        return self._fingerprint

    def _sort_out(self, members: list[ArchiveMember]) -> tuple[list[ArchiveMember], dict[str, ArchiveMember]]:
        """Images in order, and the other members that labels may be in, by path. The rest is noted, or bad."""
        images, side, odd = [], [], []
        for member in members:
            stem, suffix = posixpath.splitext(posixpath.basename(member.path))
            if any(part.startswith(".") or part == "__MACOSX" for part in member.path.split("/")):
                side.append(member)
            elif suffix.lower() in self.suffixes:
                images.append(member)
            elif suffix.lower() in SIDE_SUFFIXES or (not suffix and stem.lower() in SIDE_NAMES):
                side.append(member)
            else:
                odd.append(member)
        if isinstance(self._container, TarContainer):  # a sample may have other fields than its image
            keys = {_key(member.name) for member in images}
            side += [member for member in odd if _key(member.name) in keys]
            odd = [member for member in odd if _key(member.name) not in keys]
        self.bad += [
            (member.name, _ODD.get(posixpath.splitext(member.path)[1].lower(), "not an image file, by its suffix"))
            for member in odd
        ]
        images.sort(key=lambda member: posixpath.splitext(member.name))
        self._side = side
        return images, {member.name: member for member in side}

    def _label(
        self, images: list[ArchiveMember], fields: dict[str, ArchiveMember]
    ) -> tuple[list[int] | None, list[str], dict[int, str]]:
        """(labels or None, class names, {index: why it has no valid label})."""
        found: list[object] | None
        problems: dict[int, str] = {}
        root = _root([member.path for member in images], {member.path for member in self._side})
        tables = [member for member in self._side if member.path == root + "dataset.json"]
        if len(tables) > 1:
            raise UserError(
                f"{len(tables)} shards hold a dataset.json", "in shards, labels are key.cls or key.json beside key.png"
            )
        used: set[str] = set()
        class_names: list[str] = []
        if tables:
            used.add(tables[0].name)
            found = self._from_table(images, root, tables[0])
        else:
            found = (
                self._from_fields(images, fields, used, problems) if isinstance(self._container, TarContainer) else None
            )
            if found is None:
                found, class_names = self._from_folders([member.path[len(root) :] for member in images], problems)
        ignored = sorted(posixpath.basename(member.path) for member in self._side if member.name not in used)
        if ignored:
            kinds = list(dict.fromkeys(ignored))
            names = ", ".join(kinds[:5]) + (", ..." if len(kinds) > 5 else "")
            self.notes.append(
                f"{len(ignored)} {'file that is' if len(ignored) == 1 else 'files that are'} not an image ignored:"
                f" {names}"
            )
        if found is None:
            return None, [], problems
        labels = []
        for i, label in enumerate(map(read_label, found)):
            if isinstance(label, Reason):
                problems.setdefault(i, label)
            labels.append(-1 if isinstance(label, Reason) or i in problems else label)
        if not class_names:
            class_names = [str(c) for c in range(max(labels, default=-1) + 1)]
        return labels, class_names, problems

    def _from_table(self, images: list[ArchiveMember], root: str, table: ArchiveMember) -> list[object] | None:
        try:
            rows = json_object(parse_json(self._container.read(table)), "it")["labels"]
            pairs = list(rows.items() if isinstance(rows, dict) else rows or [])
            pairs = [(posixpath.normpath(str(name).replace("\\", "/")), label) for name, label in pairs]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            hint = 'expected: {"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}'
            raise UserError(
                f"{self._container.place(table)} does not hold labels as EDM writes them: {what}", hint
            ) from error
        if rows is None:
            self.notes.append(f"unlabelled, as {table.name} says")
            return None
        labels: JsonObject = {}
        for name, label in pairs:
            labels[name] = (
                label if labels.get(name, label) == label else Reason(f"two labels: {labels[name]} and {label}")
            )
        have = {member.path for member in images} | {name for name, _ in self.bad}
        self.bad += [
            (root + name, f"named in {table.name} but not there") for name in labels if root + name not in have
        ]
        self.notes.append(f"labels from {table.name}")
        return [labels.get(member.path[len(root) :]) for member in images]

    def _from_fields(
        self, images: list[ArchiveMember], fields: dict[str, ArchiveMember], used: set[str], problems: dict[int, str]
    ) -> list[object] | None:
        """Labels of a WebDataset: a sample's key is its path up to the first dot of the file's name (or the last one,
        if that fits)."""
        stems: set[str] = set()
        plain = {posixpath.splitext(member.name)[0] for member in images}
        found: list[object] = []
        for i, member in enumerate(images):
            stem, key = posixpath.splitext(member.name)[0], _key(member.name)
            field = next(
                (fields[name] for base in (stem, key) for name in (base + ".cls", base + ".json") if name in fields),
                None,
            )
            if stem in stems or (stem != key and key in plain) or (field is not None and field.name in used):
                problems[i] = f"a second image of the sample {key!r}"
            stems.add(stem)
            label = None
            if field is not None:
                label, is_label = self._from_field(field)
                if is_label:
                    used.add(field.name)
            found.append(label)
        if not used:
            return None
        self.notes.append("labels from the .cls or .json beside each image")
        return found

    def _from_field(self, field: ArchiveMember) -> tuple[object, bool]:
        """(label, whether the field holds one)."""
        try:
            text = self._container.read(field).decode("utf-8").strip()
            if field.path.endswith(".json"):
                value = parse_json(text)
                if isinstance(value, dict) and "label" in value:
                    return value["label"], True
                return None, False
            return (int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text), True
        except (OSError, ValueError) as error:
            return Reason(f"its label cannot be read from {field.name}: {error}"), True

    def _from_folders(self, paths: list[str], problems: dict[int, str]) -> tuple[list[object] | None, list[str]]:
        tops = [path.split("/", 1)[0] if "/" in path else None for path in paths]
        class_names = sorted({top for top in tops if top is not None})
        if not class_names:
            return None, []
        shown = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
        self.notes.append(f"classes are the {len(class_names)} sub-folders: {shown}")
        numbers = {name: i for i, name in enumerate(class_names)}
        problems.update(
            {i: "no class: it lies beside the class sub-folders" for i, top in enumerate(tops) if top is None}
        )
        return [None if top is None else numbers[top] for top in tops], class_names


class LatentFiles(Files):
    """Stored latents in a container: an array in each `.npy` (`d2o.data.stored_latents`)."""

    suffixes = (".npy",)

    def read(self, index: int) -> bytes:
        return self._container.read(self._members[index])

    def size(self, index: int) -> int:
        """Of the file, in bytes."""
        return self._members[index].size


def open_source(path: str) -> ImageSource:
    """The images `path` stands for. Raises UserError for a path that is none of `LAYOUTS`; `MissingImages` if nothing
    is there."""
    if path.startswith("real:"):
        if path not in REAL:
            raise unknown("real image set", path, REAL)
        images, labels = digits(path[-1] if "/" in path else None)
        return Arrays(images[..., None], labels)
    path = os.path.expanduser(path)
    lower = path.lower()
    if is_lmdb(path):
        return _files(LmdbFiles(path))
    if os.path.isdir(path):
        return _from_container(FolderContainer(path), path)
    if not os.path.exists(path):
        if any(sign in path for sign in "*?[{"):
            return _files(TarContainer(_named(_shards(path))))
        raise MissingImages(f"no such file or folder: {path}", LAYOUTS)
    check_input(path, "a file or folder of images")
    if lower.endswith(".zip"):
        return _from_container(ZipContainer(path), path)
    if lower.endswith((".tar", ".tar.gz", ".tgz")):
        return _from_container(TarContainer([(os.path.basename(path), path)]), path)
    if lower.endswith(".npz"):
        return open_npz(path)
    raise UserError(f"{path} is not a set of images: its suffix says neither .zip, .tar, .tar.gz nor .npz", LAYOUTS)


def _from_container(container: Container, path: str) -> ImageSource:
    return open_cifar(container, path) or _files(container)


def _files(container: Container) -> Files:
    """Images, or stored latents where there are those and no images."""
    found = {posixpath.splitext(member.path)[1].lower() for member in container.members}
    return LatentFiles(container) if ".npy" in found and not found & set(decode.SUFFIXES) else Files(container)


def _root(images: list[str], side: set[str]) -> str:
    """The directories that hold everything ("" or "a/b/"), down to the class folders or to dataset.json."""
    root = ""
    while root + "dataset.json" not in side:
        rests = [path[len(root) :].split("/") for path in images]
        if len({rest[0] for rest in rests}) != 1:
            break
        below = f"{root}{rests[0][0]}/"
        if min(map(len, rests)) < 2 or (min(map(len, rests)) < 3 and below + "dataset.json" not in side):
            break
        root = below
    return root


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return (folder + "/" if folder else "") + base.split(".", 1)[0]


def _shards(pattern: str) -> list[str]:
    paths: list[str] = []
    for path in _braces(pattern):
        found = sorted(glob.glob(path)) if any(sign in path for sign in "*?[") else [path] * os.path.exists(path)
        if not found:
            raise MissingImages(f"no shard {path!r}" + (f", named by {pattern!r}" if path != pattern else ""), LAYOUTS)
        paths += found
    paths = list(dict.fromkeys(paths))
    for path in paths:
        if not path.lower().endswith((".tar", ".tar.gz", ".tgz")) or not os.path.isfile(path):
            raise UserError(f"a pattern names tar shards, but {path!r} is none", LAYOUTS)
    return paths


def _braces(pattern: str) -> Iterable[str]:
    """Shell-like: {000..012} counts (with leading zeros if the ends have them), {a,b} lists."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        ends = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", part) if i % 2 else None
        if ends:
            first, last = ends.groups()
            if int(last) < int(first) or int(last) - int(first) >= MAX_CLASSES:
                raise UserError(f"the range {{{part}}} of {pattern!r} is empty or too long")
            width = len(first) if first.startswith("0") else 0
            choices.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    return ("".join(choice) for choice in itertools.product(*choices))


def _named(paths: list[str]) -> list[tuple[str, str]]:
    """Shards by their path below the folder common to all."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return [(os.path.relpath(os.path.abspath(path), folder).replace(os.sep, "/"), path) for path in paths]
