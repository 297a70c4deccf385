"""Moves the bytes of one file from a server to `NAME.part`, continuing where an earlier attempt stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from d2o.errors import UserError
from d2o.inputs import MAX_JSON_BYTES, JsonObject, parse_json
from d2o.interop.content import START, wrong_start
from d2o.interop.safetensors_io import atomic_write, write_error

if TYPE_CHECKING:
    import requests  # type: ignore[import-untyped]

Received = Callable[[int, "int | None"], None]
"""Called with the bytes that are there and the bytes of the whole file (None: not known)."""

TRIES = 5
"""Failures in a row, with less than a new block each, until we give up."""
PAUSE = 1.0
"""Seconds before the second try; doubled for each one after it, to at most 30."""
TIMEOUT = (20.0, 60.0)
"""Seconds to wait for a connection, and for the next bytes."""
SLOWEST = (1000, 60.0)
"""A server that sends fewer than so many bytes a second, over so many seconds, has stalled."""
MAX_BYTES = 2**37
"""Of one file: 128 GiB. Whatever declares more, or goes on beyond it, is none that d2o reads."""
MAX_UNDECLARED = 2**32
"""Of a file whose length the server does not say: 4 GiB."""
BLOCK = 1 << 16
"""Bytes asked of the network at once: what a broken connection costs at most."""
CHUNK = 1 << 20
"""Bytes read from files at once."""


class Interrupted(Exception):
    """The transfer stopped for a reason that may pass; what came is kept."""


class PartFile:
    """`NAME.part`: the first `position` bytes of the file, with their running sha256.

    `validator` is the server's strong ETag (else its Last-Modified), without which bytes of two requests are never
    joined. `known`: the file's sha256 is, so that nobody needs to guess from its first bytes whether it is the right
    one.
    """

    def __init__(self, path: Path, url: str, known: bool = False):
        self.known = known
        self.path, self.target, self.url = path.with_name(path.name + ".part"), path, url
        self.note = path.with_name(path.name + ".part.json")
        self.file: BinaryIO | None = None
        self.position, self.digest = 0, hashlib.sha256()
        self.validator: str | None = None
        self.total: int | None = None

    def __enter__(self) -> PartFile:
        note = read_object(self.note) or {}
        try:
            if note.get("url") == self.url and note.get("validator") and self.path.is_file():
                self.file = open(self.path, "r+b", buffering=0)
                self.position = feed(self.digest, self.file)
                self.validator, self.total = note["validator"], note.get("total")
            else:
                self.begin(None, None)
        except OSError as error:
            raise self.write_error(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        if not self.position or self.validator is None:  # nothing that a later run could use
            self.discard()

    def begin(self, validator: str | None, total: int | None) -> None:
        """Throw away what is there and start with the file that `validator` names."""
        if self.file is not None:
            self.file.close()
        try:
            self.note.unlink(missing_ok=True)  # first, so that it never describes bytes of another file
            self.file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise self.write_error(error) from error
        self.position, self.digest = 0, hashlib.sha256()
        self.validator, self.total = validator, total
        if validator is not None:
            atomic_write(self.note, json.dumps({"url": self.url, "validator": validator, "total": total}) + "\n")

    def append(self, data: bytes) -> None:
        assert self.file is not None
        written = 0
        try:
            while written < len(data):
                written += self.file.write(memoryview(data)[written:])
        except OSError as error:
            raise self.write_error(error) from error
        self.position += len(data)
        self.digest.update(data)

    def room(self, needed: int) -> None:
        """UserError when the disk has no room for `needed` more bytes."""
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            message = f"cannot write {self.target}: {needed:,} more bytes are needed, and the disk has {free:,} free"
            raise UserError(message, "make room and run again, or set D2O_HOME to a folder on another disk")

    def write_error(self, error: OSError) -> UserError:
        hint = "make room and run again (what came so far is kept), or set D2O_HOME to another folder"
        return UserError(write_error(self.target, error).message, hint)

    def discard(self) -> None:
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Flush to the disk and take the whole file's name."""
        assert self.file is not None
        try:
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.path, self.target)
        except OSError as error:
            raise self.write_error(error) from error
        self.note.unlink(missing_ok=True)


def fetch_http(part: PartFile, url: str, path: Path, size: int | None, progress: Received | None) -> None:
    """Bring `part` to the whole file; what came before is continued where the server still has the same file.
    UserError: it cannot be had."""
    import requests  # type: ignore[import-untyped]

    furthest, failures = part.position, 0
    with requests.Session() as session:
        while True:
            try:
                return _request(session, part, url, path, size, progress)
            except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
                raise failed(url, path, "that is no URL", again=False) from error
            except (requests.RequestException, Interrupted) as error:
                if _no_network(error) and not part.position:
                    raise failed(url, path, f"{_reason(error)}; is there a network here?") from error
                failures = (
                    1 if part.position - furthest >= BLOCK else failures + 1
                )  # a server that drips makes no progress
                furthest = max(furthest, part.position)
                if failures >= TRIES:
                    raise failed(url, path, _reason(error)) from error
                time.sleep(min(30.0, PAUSE * 2 ** (failures - 1)))


def _request(
    session: requests.Session, part: PartFile, url: str, path: Path, size: int | None, progress: Received | None
) -> None:
    """Ask once for what is missing and append it. Interrupted or requests' own errors: ask again."""
    from d2o.version import __version__

    headers = {"Accept-Encoding": "identity", "User-Agent": f"d2o/{__version__}"}
    if part.position and part.validator is None:
        part.begin(None, None)
    if part.position and part.position == part.total:  # killed between the last byte and the rename
        return
    if part.position:
        headers |= {"Range": f"bytes={part.position}-", "If-Range": str(part.validator)}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status == 416 or (status == 206 and not _continues(response, part)):
            part.begin(None, None)
            raise Interrupted("the file on the server has changed")
        if status in (408, 425, 429) or status >= 500:
            raise Interrupted(f"the server answers {status} {response.reason}")
        if status not in (200, 206):
            reasons = {
                401: "the server wants a login",
                403: "the server refuses access",
                404: "there is no such file on the server",
            }
            raise failed(
                url, path, f"{reasons.get(status, 'the server answers')} ({status} {response.reason})", again=False
            )
        if status == 200:
            part.begin(_validator(response), _length(response))
        total = part.total
        if size is not None and total is not None and total != size:
            part.discard()
            raise failed(
                url,
                path,
                f"the file on the server has {total:,} bytes, expected {size:,}: it is another file",
                again=False,
            )
        if total is None and size is None and response.headers.get("Transfer-Encoding", "").lower() != "chunked":
            raise failed(
                url,
                path,
                "the server does not say how long the file is, so nobody could tell a part from the whole",
                again=False,
            )
        total = total if total is not None else size
        limit = MAX_BYTES if total is not None else MAX_UNDECLARED
        if total is not None and total > limit:
            part.begin(None, None)
            raise failed(url, path, f"the file on the server has {total:,} bytes; the limit is {limit:,}", again=False)
        part.room(total - part.position if total is not None else 0)
        start = b"" if part.position == 0 and not part.known else None
        for data in _blocks(response):
            if start is not None and len(start := start + data) >= START:
                if why := wrong_start(start, path.name):
                    part.begin(None, None)
                    raise failed(url, path, why, again=False)
                start = None
            part.append(data)
            if total is not None and part.position > total:
                part.begin(None, None)
                raise Interrupted(f"more than the {total:,} bytes came that the file should have")
            if part.position > limit:
                part.begin(None, None)
                raise failed(
                    url,
                    path,
                    f"the server does not say how long the file is, and sent more than {limit:,} bytes",
                    again=False,
                )
            if progress is not None:
                progress(part.position, total)
        if total is not None and part.position < total:
            raise Interrupted(f"the connection was closed after {part.position:,} of {total:,} bytes")


def _blocks(response: requests.Response) -> Iterator[bytes]:
    """The body as it comes, in blocks of at most BLOCK bytes. Interrupted: it comes more slowly than SLOWEST.

    Not `iter_content`: it waits for a whole block, which from a server that drips never comes.
    """
    from urllib3.exceptions import HTTPError

    rate, seconds = SLOWEST
    since, came = time.monotonic(), 0
    try:
        while data := response.raw.read1(BLOCK):
            yield data
            came += len(data)
            if (passed := time.monotonic() - since) >= seconds:
                if came < rate * passed:
                    raise Interrupted(f"the server sent only {came:,} bytes in {passed:.0f} seconds")
                since, came = time.monotonic(), 0
    except HTTPError as error:
        raise Interrupted(_reason(error)) from error


def _continues(response: requests.Response, part: PartFile) -> bool:
    """Whether a partial answer continues our part: from its end, of a file with the same length and the same ETag."""
    unit, _, spans = response.headers.get("Content-Range", "").partition(" ")
    span, _, total = spans.partition("/")
    first = span.partition("-")[0]
    same = part.validator in (None, _validator(response)) or _validator(response) is None
    return unit == "bytes" and first == str(part.position) and total in ("*", str(part.total)) and same


def _validator(response: requests.Response) -> str | None:
    """What If-Range takes: a strong ETag, else the date of the last change."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


def _length(response: requests.Response) -> int | None:
    """Content-Length, unless the body is encoded (then it counts other bytes)."""
    length = response.headers.get("Content-Length", "")
    return (
        int(length) if length.isdigit() and response.headers.get("Content-Encoding", "identity") == "identity" else None
    )


def fetch_fsspec(part: PartFile, url: str, path: Path, size: int | None, progress: Received | None) -> None:
    """Any protocol that fsspec knows, from the first byte."""
    import fsspec  # type: ignore[import-untyped]

    part.begin(None, None)
    try:
        system, remote = fsspec.core.url_to_fs(url)
        total = system.info(remote).get("size")
        if size is not None and total is not None and total != size:
            raise failed(
                url, path, f"the file there has {total:,} bytes, expected {size:,}: it is another file", again=False
            )
        part.room(total or 0)
        with system.open(remote, "rb") as source:
            while data := source.read(CHUNK):
                part.append(data)
                if part.position > (MAX_UNDECLARED if total is None else MAX_BYTES):
                    raise failed(
                        url,
                        path,
                        f"more than {part.position:,} bytes came: that is no file that d2o reads",
                        again=False,
                    )
                if progress is not None:
                    progress(part.position, total)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise failed(url, path, "there is no such file", again=False) from error
    except Exception as error:  # every protocol has errors of its own
        raise failed(url, path, _reason(error)) from error
    if total is not None and part.position != total:
        raise failed(url, path, f"the connection was closed after {part.position:,} of {total:,} bytes")


def failed(url: str, path: Path, reason: str, again: bool = True) -> UserError:
    """The error of a download: what failed, which URL, and where to put the file."""
    hint = f"download it by other means and put it at {path}"
    return UserError(f"cannot download {url}: {reason}", f"run again to continue, or {hint}" if again else hint)


def _no_network(error: BaseException | None) -> bool:
    """Whether no connection came about at all: trying again at once would not change that."""
    from urllib3.exceptions import NewConnectionError

    while error is not None:
        if isinstance(error, NewConnectionError) or (
            (reason := getattr(error, "reason", None)) is not None and _no_network(reason)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_reachable(url: str) -> str | None:
    """Why no connection to the server of `url` comes about, or None. One try, and nothing is fetched."""
    import requests  # type: ignore[import-untyped]

    try:
        requests.head(url, timeout=(TIMEOUT[0] / 2, TIMEOUT[0]), allow_redirects=False).close()
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        return _reason(error)
    except requests.RequestException:
        return None  # the client itself will say what is wrong
    return None


def _reason(error: Exception) -> str:
    """The innermost cause of a network error in one line: requests wraps it several times."""
    import requests  # type: ignore[import-untyped]

    if isinstance(error, Interrupted):
        return str(error)
    causes: list[BaseException] = [error]
    while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(inner)
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection within {TIMEOUT[0]:g} seconds"
    if any(isinstance(cause, TimeoutError | requests.exceptions.Timeout) for cause in causes):
        return f"the server sent nothing for {TIMEOUT[1]:g} seconds"
    return str(causes[-1]) or type(causes[-1]).__name__


def feed(digest: hashlib._Hash, file: BinaryIO) -> int:
    """Hash the rest of `file`; the number of bytes."""
    count = 0
    while data := file.read(CHUNK):
        digest.update(data)
        count += len(data)
    return count


def read_object(path: Path) -> JsonObject | None:
    """The JSON object in a file, or None: there is none."""
    try:
        record = parse_json(path.read_bytes()) if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES else None
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
