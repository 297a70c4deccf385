"""Which layout a path has, and the list it stands for: images with their labels, whatever holds them.

Accepted: a folder, a zip, a WebDataset tar or its shards, an npz, and scikit-learn's digits as `real:digits`. Labels, in this order:
1. `dataset.json` as EDM writes it: {"labels": [["00000/img00000000.png", 6], ...]}, or {"labels": null} for an unlabelled set;
2. in a tar, a `key.cls` (a number) or `key.json` (its "label") beside `key.png`;
3. sub-folders: each is a class, numbered in plain order of the names.
An archive of a folder is read like the folder: one directory that holds everything else is looked through.

Images are in plain (not numeric: "10" < "9") order of their paths without suffix, so that the set does not depend on the container
or the file system.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import os
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from d2o.data import decode
from d2o.data.containers import Container, Folder, Member, Tar, Zip
from d2o.data.synthetic.digits import digits
from d2o.errors import UserError, unknown

LAYOUTS = (
    "accepted: a folder of images (a class is a sub-folder, or labels in dataset.json), an EDM-style .zip, "
    "WebDataset .tar/.tar.gz (shards as name-{000..009}.tar or name-*.tar), an .npz, real:digits, real:digits/a, real:digits/b"
)
REAL = ("real:digits", "real:digits/a", "real:digits/b")
MAX_CLASSES = 1_000_000
SIDE_SUFFIXES = {".json", ".jsonl", ".txt", ".md", ".rst", ".csv", ".tsv", ".yaml", ".yml", ".html", ".xml", ".log", ".db", ".ini"}
SIDE_NAMES = {"readme", "license", "licence", "copying", "changelog", "makefile", "icon\r"}


class Reason(str):
    """In the place of a label: why there is none."""


class Source:
    """Images by number: `names`, `labels` (None for all, or an int each) and `class_names` fit each other; `bad` is left out of them."""

    names: list[str]
    labels: list[int] | None
    class_names: list[str]
    bad: list[tuple[str, str]]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def head(self, index: int) -> decode.Head:
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """sha256 over what was found, good or bad, before any resizing."""
        raise NotImplementedError


class Files(Source):
    """Images in a container. The fingerprint covers names, sizes in bytes and labels, not the bytes themselves."""

    def __init__(self, container: Container):
        self._container = container
        self.bad, self.notes = list(container.bad), list(container.notes)
        images, fields = self._sort_out(container.members)
        labels, self.class_names, problems = self._label(images, fields)
        self.bad += [(images[i].name, why) for i, why in problems.items()]
        stamp = hashlib.sha256()
        for i, member in enumerate(images):
            stamp.update(f"{member.name}\0{member.size}\0{labels[i] if labels and i not in problems else '-'}\n".encode())
        self._fingerprint = stamp.hexdigest()
        good = [i for i in range(len(images)) if i not in problems]
        self._members = [images[i] for i in good]
        self.names = [member.name for member in self._members]
        self.labels = None if labels is None else [labels[i] for i in good]

    def head(self, index: int) -> decode.Head:
        return decode.read_head(functools.partial(self._container.read, self._members[index]))

    def picture(self, index: int) -> Image.Image:
        return decode.open_picture(self._container.read(self._members[index]))

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _sort_out(self, members: list[Member]) -> tuple[list[Member], dict[str, Member]]:
        """Images in order, and the other members that labels may be in, by path. The rest is noted, or bad."""
        images, side, odd = [], [], []
        for member in members:
            stem, suffix = posixpath.splitext(posixpath.basename(member.path))
            if any(part.startswith(".") or part == "__MACOSX" for part in member.path.split("/")):
                side.append(member)
            elif suffix.lower() in decode.SUFFIXES:
                images.append(member)
            elif suffix.lower() in SIDE_SUFFIXES or (not suffix and stem.lower() in SIDE_NAMES):
                side.append(member)
            else:
                odd.append(member)
        if isinstance(self._container, Tar):  # a sample may have other fields than its image
            keys = {_key(member.name) for member in images}
            side += [member for member in odd if _key(member.name) in keys]
            odd = [member for member in odd if _key(member.name) not in keys]
        self.bad += [(member.name, "not an image file, by its suffix") for member in odd]
        images.sort(key=lambda member: posixpath.splitext(member.name))
        self._side = side
        return images, {member.name: member for member in side}

    def _label(self, images: list[Member], fields: dict[str, Member]) -> tuple[list[int] | None, list[str], dict[int, str]]:
        """(labels or None, class names, {index: why it has no valid label})."""
        found: list[Any] | None
        problems: dict[int, str] = {}
        root = _root([member.path for member in images], {member.path for member in self._side})
        tables = [member for member in self._side if member.path == root + "dataset.json"]
        if len(tables) > 1:
            raise UserError(f"{len(tables)} shards hold a dataset.json", "in shards, labels are key.cls or key.json beside key.png")
        used: set[str] = set()
        class_names: list[str] = []
        if tables:
            used.add(tables[0].name)
            found = self._from_table(images, root, tables[0])
        else:
            found = self._from_fields(images, fields, used, problems) if isinstance(self._container, Tar) else None
            if found is None:
                found, class_names = self._from_folders([member.path[len(root) :] for member in images], problems)
        ignored = sorted(posixpath.basename(member.path) for member in self._side if member.name not in used)
        if ignored:
            kinds = list(dict.fromkeys(ignored))
            names = ", ".join(kinds[:5]) + (", ..." if len(kinds) > 5 else "")
            self.notes.append(f"{len(ignored)} {'file that is' if len(ignored) == 1 else 'files that are'} not an image ignored: {names}")
        if found is None:
            return None, [], problems
        for i, label in enumerate(found):
            if i not in problems and (why := _wrong(label)):
                problems[i] = why
        labels = [-1 if i in problems else int(label) for i, label in enumerate(found)]
        if not class_names:
            class_names = [str(c) for c in range(max(labels, default=-1) + 1)]
        return labels, class_names, problems

    def _from_table(self, images: list[Member], root: str, table: Member) -> list[Any] | None:
        try:
            rows = json.loads(self._container.read(table))["labels"]
            pairs = list(rows.items() if isinstance(rows, dict) else rows or [])
            pairs = [(posixpath.normpath(str(name).replace("\\", "/")), label) for name, label in pairs]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            hint = 'expected: {"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}'
            raise UserError(f"{table.name} does not hold labels as EDM writes them: {what}", hint) from error
        if rows is None:
            self.notes.append(f"unlabelled, as {table.name} says")
            return None
        labels: dict[str, Any] = {}
        for name, label in pairs:
            labels[name] = label if labels.get(name, label) == label else Reason(f"two labels: {labels[name]} and {label}")
        have = {member.path for member in images} | {name for name, _ in self.bad}
        self.bad += [(root + name, f"named in {table.name} but not there") for name in labels if root + name not in have]
        self.notes.append(f"labels from {table.name}")
        return [labels.get(member.path[len(root) :]) for member in images]

    def _from_fields(self, images: list[Member], fields: dict[str, Member], used: set[str], problems: dict[int, str]) -> list[Any] | None:
        """Labels of a WebDataset: a sample's key is its path up to the first dot of the file's name (or the last one, if that fits)."""
        stems: set[str] = set()
        plain = {posixpath.splitext(member.name)[0] for member in images}
        found: list[Any] = []
        for i, member in enumerate(images):
            stem, key = posixpath.splitext(member.name)[0], _key(member.name)
            field = next((fields[name] for base in (stem, key) for name in (base + ".cls", base + ".json") if name in fields), None)
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

    def _from_field(self, field: Member) -> tuple[Any, bool]:
        """(label, whether the field holds one)."""
        try:
            text = self._container.read(field).decode("utf-8").strip()
            if field.path.endswith(".json"):
                value = json.loads(text)
                held = isinstance(value, dict) and "label" in value
                return (value["label"] if held else None), held
            return (int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else text), True
        except (OSError, ValueError, RecursionError) as error:
            return Reason(f"its label cannot be read from {field.name}: {error}"), True

    def _from_folders(self, paths: list[str], problems: dict[int, str]) -> tuple[list[Any] | None, list[str]]:
        tops = [path.split("/", 1)[0] if "/" in path else None for path in paths]
        class_names = sorted({top for top in tops if top is not None})
        if not class_names:
            return None, []
        shown = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
        self.notes.append(f"classes are the {len(class_names)} sub-folders: {shown}")
        numbers = {name: i for i, name in enumerate(class_names)}
        problems.update({i: "no class: it lies beside the class sub-folders" for i, top in enumerate(tops) if top is None})
        return [None if top is None else numbers[top] for top in tops], class_names


class Arrays(Source):
    """Images held as one array `pixels`: uint8 [n, H, W, C], C 1, 3 or 4 (alpha). The fingerprint covers the pixels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None = None):
        self.bad, self.notes = [], []
        self._all, self._all_labels = pixels, labels
        names = [f"{i:08d}" for i in range(len(pixels))]
        self.names, self.labels, self.class_names, self.pixels = names, None, [], pixels
        if labels is not None:
            values = labels.tolist()
            problems = {i: why for i, label in enumerate(values) if (why := _wrong(label))}
            good = [i for i in range(len(values)) if i not in problems]
            self.bad = [(names[i], why) for i, why in problems.items()]
            if problems:
                self.names, self.pixels = [names[i] for i in good], pixels[good]
            self.labels = [int(values[i]) for i in good]
            self.class_names = [str(c) for c in range(max(self.labels, default=-1) + 1)]

    def head(self, index: int) -> decode.Head:
        _, height, width, channels = self.pixels.shape
        return decode.Head((width, height), channels == 1, ("with alpha composited on white",) if channels == 4 else ())

    def picture(self, index: int) -> Image.Image:
        pixels = np.ascontiguousarray(self.pixels[index])
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    @functools.cached_property
    def _fingerprint(self) -> str:
        stamp = hashlib.sha256(f"{self._all.shape}".encode())
        for image in self._all:
            stamp.update(image.tobytes())
        if self._all_labels is not None:
            stamp.update(repr(self._all_labels.tolist()).encode())
        return stamp.hexdigest()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint


def open_source(path: str) -> Source:
    """The images `path` stands for. Raises UserError for a path that is none of `LAYOUTS`."""
    if path.startswith("real:"):
        if path not in REAL:
            raise unknown("real image set", path, REAL)
        images, labels = digits(path[-1] if "/" in path else None)
        return Arrays(images[..., None], labels)
    path = os.path.expanduser(path)
    lower = path.lower()
    if os.path.isdir(path):
        return Files(Folder(path))
    if not os.path.exists(path):
        if any(sign in path for sign in "*?[{"):
            return Files(Tar(_named(_shards(path))))
        raise UserError(f"no such file or folder: {path}", LAYOUTS)
    if not os.path.isfile(path):
        raise UserError(f"{path} is neither a file nor a folder", LAYOUTS)
    openers: dict[tuple[str, ...], Callable[[str], Source]] = {
        (".zip",): lambda path: Files(Zip(path)),
        (".tar", ".tar.gz", ".tgz"): lambda path: Files(Tar([(os.path.basename(path), path)])),
        (".npz",): _open_npz,
    }
    for suffixes, opener in openers.items():
        if lower.endswith(suffixes):
            return opener(path)
    raise UserError(f"{path} is not a set of images: its suffix says neither .zip, .tar, .tar.gz nor .npz", LAYOUTS)


def _open_npz(path: str) -> Arrays:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("one array without a name")
        with loaded:
            key = next((key for key in ("images", "x", "arr_0") if key in loaded.files), None)
            if key is None:
                hint = "d2o eval --against takes statistics; here images are needed" if {"mu", "sigma"} <= set(loaded.files) else LAYOUTS
                raise UserError(f"{path} holds no array named images, x or arr_0, but: {', '.join(loaded.files) or 'nothing'}", hint)
            pixels = loaded[key]
            labels_key = next((key for key in ("labels", "y", "arr_1") if key in loaded.files), None)
            labels = None if labels_key is None else loaded[labels_key]
    except (ValueError, OSError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable npz: {error}", "it may be cut off, or hold Python objects (not read)") from error
    if pixels.dtype != np.uint8:
        raise UserError(f"{path}: {key} is {pixels.dtype}, not uint8", "save pixels as uint8, 0 to 255")
    source = Arrays(_channels_last(pixels, f"{path}: {key}"), _label_row(labels, len(pixels), f"{path}: {labels_key}"))
    if labels_key is not None:
        source.notes.append(f"labels from the array {labels_key!r}")
    return source


def _channels_last(pixels: np.ndarray, what: str) -> np.ndarray:
    """[n, H, W, C] of NHWC, NCHW (where only the second axis can be channels) or NHW."""
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    elif pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4) and pixels.shape[1] in (1, 3, 4):
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or pixels.shape[3] not in (1, 3, 4) or 0 in pixels.shape[1:]:
        raise UserError(f"{what} has shape {list(pixels.shape)}", "expected [n, H, W, C], [n, C, H, W] (C 1, 3 or 4) or [n, H, W]")
    return pixels


def _label_row(labels: np.ndarray | None, count: int, what: str) -> np.ndarray | None:
    if labels is None:
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise UserError(f"{what} has shape {list(labels.shape)}", f"expected one label for each of the {count} images")
    return labels


def _wrong(label: Any) -> str | None:
    """Why this is no label, or None."""
    if label is None:
        return "no label"
    if isinstance(label, Reason):
        return label
    if isinstance(label, bool) or not (isinstance(label, int) or (isinstance(label, float) and label.is_integer())):
        return f"the label {str(label)[:20]!r} is not a whole number"
    if not 0 <= label < MAX_CLASSES:
        return f"the label {label} is out of range (0 to {MAX_CLASSES - 1})"
    return None


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
            raise UserError(f"no shard {path!r}" + (f", named by {pattern!r}" if path != pattern else ""), LAYOUTS)
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
