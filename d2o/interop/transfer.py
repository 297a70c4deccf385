"""Moves the bytes of one file from a server to `NAME.part`, continuing where an earlier attempt stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from d2o.errors import UserError
from d2o.interop.content import START, wrong_start
from d2o.interop.part_file import CHUNK, PartFile

if TYPE_CHECKING:
    import requests

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


class Interrupted(Exception):
    """The transfer stopped for a reason that may pass; what came is kept."""


def fetch_http(part: PartFile, url: str, path: Path, size: int | None, progress: Received | None) -> None:
    """Bring `part` to the whole file; what came before is continued where the server still has the same file.
    UserError: it cannot be had."""
    import requests

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
    import fsspec

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
    import requests

    try:
        requests.head(url, timeout=(TIMEOUT[0] / 2, TIMEOUT[0]), allow_redirects=False).close()
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        return _reason(error)
    except requests.RequestException:
        return None  # the client itself will say what is wrong
    return None


def _reason(error: Exception) -> str:
    """The innermost cause of a network error in one line: requests wraps it several times."""
    import requests

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
