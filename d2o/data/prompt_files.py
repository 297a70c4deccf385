"""Prompt files of any length: .txt (one prompt a line), .jsonl and .parquet, read where they lie. In memory are sixteen
bytes a prompt."""

from __future__ import annotations

import bisect
import hashlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from d2o.data.containers import printable
from d2o.data.prompts import MAX_PROMPT_BYTES, Prompts, too_long, whole_text
from d2o.errors import UserError
from d2o.inputs import JsonObject, check_input, check_size, check_unpacked, parse_json
from d2o.interop.assets import asset
from d2o.interop.download import download, home
from d2o.interop.safetensors_io import file_sha256
from d2o.work.objects import filesystem, local_path, whole_url

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Schema

COLUMNS = ("prompt", "text", "caption")
"""Where .jsonl and .parquet files have their prompts: the first of these that the first line, or the table, has."""
CHUNK = 2**24
GROUPS = 2
"""Row groups of a .parquet file that are kept in memory."""
DIGITS = "digits"
"""The name of the prompts that ship."""
MAX_LINE_BYTES = 2**20
"""Of one line of a .jsonl, with whatever else it says."""
MAX_GROUP_ROWS = 2**25
"""Of one row group of a .parquet file; writers make groups of a million."""


def open_prompts(path: str | os.PathLike) -> Prompts:
    """A prompt file, checked from beginning to end; an fsspec URL is copied into the cache first ($D2O_HOME), once for
    each of its versions. "digits" without a file of that name: 120 prompts that the teacher `tiny-sd` was trained with,
    which ship.

    .txt is UTF-8 with one prompt a line; the lines of .jsonl and the rows of .parquet have it under "prompt", else
    "text", else "caption". Nothing is trimmed or changed but a byte order mark and the carriage returns of Windows.
    UserError: missing, empty, another format, not UTF-8, a blank line that is not the last, a line without a prompt
    (told by its number); .parquet without pyarrow.
    """
    if path == DIGITS and not Path(path).exists():
        path = asset("prompts_digits.txt")
    if (local := local_path(path)) is None:
        local = str(_copied(whole_url(path)))
    file = Path(local)
    kinds: dict[str, Callable[[Path], Prompts]] = {".txt": Lines, ".jsonl": JsonLines, ".parquet": Table}
    if file.suffix.lower() not in kinds:
        raise UserError(f"{path}: prompts come as {', '.join(kinds)}", "one prompt a line in a .txt is the simplest")
    check_input(file, "a file of prompts")
    try:
        return kinds[file.suffix.lower()](file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _copied(url: str) -> Path:
    """The local copy of that URL's present version."""
    fs, path = filesystem(url)
    try:
        version = "" if url.startswith("http") else fs.ukey(path)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {url}") from error
    except Exception as error:  # each backend has its own kinds
        raise UserError(
            f"cannot read {url}: {error or type(error).__name__}", "check the address, the permissions and the network"
        ) from error
    folder = hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:16]
    return download(url, home() / "prompts" / folder / PurePosixPath(url.partition("?")[0]).name)


class Lines(Prompts):
    """Lines of a mapped file. `_starts` and `_ends` are their places in it."""

    longest = MAX_PROMPT_BYTES

    def __init__(self, path: Path):
        self.path, self.sha256 = path, file_sha256(path)
        if not path.stat().st_size:
            raise UserError(f"{path} holds no prompts: it is empty")
        with open(path, "rb") as file:
            self._data: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts, self._ends = _cut_lines(path, self._data)
        lengths = self._ends - self._starts
        if (long := int(np.argmax(lengths))) >= 0 and lengths[long] > self.longest:
            raise too_long(f"{path}, line {long + 1}", int(lengths[long]), self.longest)
        self._check()

    def __len__(self) -> int:
        return len(self._starts)

    def many(self, indices: Iterable[int]) -> list[str]:
        return [self._prompt(i) for i in self._numbers(indices)]

    def _prompt(self, i: int) -> str:
        return self._text(i)

    def _text(self, i: int) -> str:
        try:
            return self._data[self._starts[i] : self._ends[i]].decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}, line {i + 1}: not UTF-8 ({error.reason})", "save the file as UTF-8"
            ) from error

    def _check(self) -> None:
        """UserError: a line without a prompt, too long, or not UTF-8."""
        for first in range(0, len(self), 4096):
            last = min(first + 4096, len(self)) - 1
            try:
                self._data[self._starts[first] : self._ends[last]].decode()
            except UnicodeDecodeError:
                for i in range(first, last + 1):
                    self._text(i)


def _cut_lines(path: Path, data: mmap.mmap | bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where each line starts and ends, int64. UserError: blank lines that are not the last."""
    begin = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    found = [
        np.flatnonzero(np.frombuffer(data[first : first + CHUNK], np.uint8) == 10) + first
        for first in range(0, len(data), CHUNK)
    ]
    ends = np.concatenate(found)
    if data[-1:] != b"\n":
        ends = np.append(ends, len(data))
    starts = np.concatenate(([begin], ends[:-1] + 1))
    content = np.frombuffer(data, np.uint8)
    returns = (ends > starts) & (content[ends - 1] == 13)  # ends - 1 is -1 only for a line that is empty anyway
    ends = ends - returns
    blank = ends == starts
    for i in np.flatnonzero(
        ~blank & np.isin(content[np.minimum(starts, len(data) - 1)], (9, 32))
    ):  # perhaps nothing but white space
        blank[i] = not data[starts[i] : ends[i]].strip()
    filled = np.flatnonzero(~blank)
    if not len(filled):
        raise UserError(f"{path} holds no prompts: its lines are blank")
    count = int(filled[-1]) + 1
    if blank[:count].any():
        raise UserError(f"{path}, line {int(np.argmax(blank)) + 1} is blank", "remove it; every line is a prompt")
    return starts[:count], ends[:count]


class JsonLines(Lines):
    longest = MAX_LINE_BYTES

    def _check(self) -> None:
        first = self._record(0)
        self._column = next((name for name in COLUMNS if name in first), "")
        if not self._column:
            raise UserError(f"{self.path}, line 1: no {_either()}; it has {', '.join(first) or 'nothing'}")
        for i in range(len(self)):
            self._prompt(i)

    def _record(self, i: int) -> JsonObject:
        text = self._text(i)
        try:
            record = parse_json(text)
        except ValueError as error:
            raise UserError(
                f"{self.path}, line {i + 1}: not JSON ({error})", "every line is an object on its own"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{self.path}, line {i + 1}: not an object with a {_either()}")
        return record

    def _prompt(self, i: int) -> str:
        prompt = self._record(i).get(self._column)
        if not isinstance(prompt, str):
            raise UserError(
                f"{self.path}, line {i + 1}: its {self._column!r} is {'missing' if prompt is None else 'not a string'}"
            )
        return whole_text(prompt, f"{self.path}, line {i + 1}")


class Table(Prompts):
    """A column of a .parquet file; the row groups used last stay in memory."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{path}: reading .parquet takes pyarrow", "pip install 'd2o[pairs]'") from error
        self.path, self.sha256 = path, file_sha256(path)
        try:
            schema = pyarrow.parquet.ParquetFile(path, memory_map=True).schema_arrow
            self._column = _text_column(path, schema)
            # What the file says once is in memory once: a page of a few bytes may name one text a million times.
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True, read_dictionary=[self._column])
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is truncated or not a parquet file ({error})") from error
        rows = self._declared()
        self._starts = [0, *np.cumsum(rows, dtype=np.int64).tolist()]
        self._groups: OrderedDict[int, ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        if not len(self):
            raise UserError(f"{path} holds no prompts: it has no rows")
        for group, start in enumerate(self._starts[:-1]):
            self._check(self._values(group), start, rows[group])

    def _declared(self) -> list[int]:
        """The rows of each group. UserError: more than a group has, or texts that would unpack to more than they
        could."""
        rows = []
        for i in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(i)
            try:
                check_size(f"row group {i}", group.num_rows, MAX_GROUP_ROWS, "rows")
                for k in range(group.num_columns):
                    chunk = group.column(k)
                    if chunk.path_in_schema == self._column:
                        check_unpacked(f"row group {i}", chunk.total_uncompressed_size, chunk.total_compressed_size)
            except ValueError as error:
                raise UserError(f"{self.path}: {error}", "write it in smaller row groups") from error
            rows.append(group.num_rows)
        return rows

    def _check(self, values: ChunkedArray, start: int, rows: int) -> None:
        """UserError: a row without a prompt, with one that is not UTF-8 or too long; fewer rows than the file says."""
        import pyarrow
        import pyarrow.compute

        if len(values) != rows:
            raise UserError(f"{self.path} is damaged: it says {rows:,} rows, and {len(values):,} are there")
        if values.null_count:
            raise UserError(
                f"{self.path}, row {start + values.is_null().index(True).as_py() + 1}: its {self._column!r} is missing"
            )
        try:
            values.validate(full=True)
            texts = [chunk.dictionary if pyarrow.types.is_dictionary(chunk.type) else chunk for chunk in values.chunks]
            longest = max(pyarrow.compute.max(pyarrow.compute.binary_length(part)).as_py() or 0 for part in texts)
        except pyarrow.ArrowException as error:
            self._many([*range(len(values))], values, start)
            raise UserError(f"{self.path} is damaged ({error})") from error
        if longest > MAX_PROMPT_BYTES:
            self._many([*range(len(values))], values, start)

    def _many(self, rows: list[int], values: ChunkedArray, start: int) -> list[str]:
        """The prompts of these rows of a group. UserError: not UTF-8, or too long."""
        found = []
        for row in rows:
            try:
                found.append(whole_text(values[row].as_py(), f"{self.path}, row {start + row + 1}"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.path}, row {start + row + 1}: not UTF-8 ({error.reason})", "save the texts as UTF-8"
                ) from error
        return found

    def __len__(self) -> int:
        return self._starts[-1]

    def many(self, indices: Iterable[int]) -> list[str]:
        numbers = self._numbers(indices)
        groups = [bisect.bisect_right(self._starts, i) - 1 for i in numbers]
        found = [""] * len(numbers)
        for group in sorted(set(groups)):  # each is read once
            values = self._values(group)
            places = [k for k, g in enumerate(groups) if g == group]
            texts = self._many([numbers[place] - self._starts[group] for place in places], values, self._starts[group])
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found

    def _values(self, group: int) -> ChunkedArray:
        with self._lock:
            if group not in self._groups:
                import pyarrow

                try:
                    self._groups[group] = self._file.read_row_group(group, columns=[self._column]).column(0)
                except (pyarrow.ArrowException, OSError) as error:
                    raise UserError(f"{self.path} is damaged ({error})") from error
                if len(self._groups) > GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]


def _text_column(path: Path, schema: Schema) -> str:
    """The name of the table's column of prompts. UserError: it has none, or one of something else."""
    from pyarrow import types

    column = next((name for name in COLUMNS if name in schema.names), None)
    if column is None:
        raise UserError(f"{path}: no column {_either()}; it has {', '.join(map(printable, schema.names)) or 'none'}")
    kind = schema.field(schema.names.index(column)).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise UserError(f"{path}: its column {column!r} holds {kind}, not strings")
    return column


def _either() -> str:
    return ", ".join(repr(name) for name in COLUMNS[:-1]) + f" or {COLUMNS[-1]!r}"
