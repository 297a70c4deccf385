"""Downloads against a server that misbehaves: what comes is whole or is not there, and the message says what to do."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from d2o.errors import UserError
from d2o.interop import download as module
from d2o.interop import transfer
from d2o.interop.download import download, download_record, home, offline, verify_file
from tests.workers import CONTEXT, finish, wait_for

NOISE = hashlib.shake_128(b"weights").digest(3_000_000 - 8)
CONTENT = b"\x80\x04B" + len(NOISE).to_bytes(4, "little") + NOISE + b"."  # a pickle, as its name says
OTHER = CONTENT[:7] + NOISE[::-1] + b"."
SHORTER = b"\x80\x04B" + (900_000).to_bytes(4, "little") + NOISE[:900_000] + b"."
BLOCK = transfer.BLOCK


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server.behaviour
        number = len(server.requests)
        server.requests.append(dict(self.headers))
        status = server.statuses.get(number)
        if status or self.path != "/net.pkl":
            self.send_error(status or 404)
            return
        content, start = server.content, 0
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if wanted and server.ranges and (server.deaf or condition in (None, server.etag)):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(len(content) - start + server.lie))
        self.end_headers()
        body = content[start:]
        body = body[: server.drops.get(number, len(body))]
        for i in range(0, len(body), 100_000):
            if server.hold.is_set():
                time.sleep(server.pause)
            with contextlib.suppress(OSError):
                self.wfile.write(body[i : i + 100_000])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """`drops` and `statuses` are by the number of the request; `lie` is added to the stated length; `deaf` to
    If-Range."""
    behaviour = SimpleNamespace(
        content=CONTENT,
        etag='"v1"',
        ranges=True,
        length=True,
        lie=0,
        deaf=False,
        pause=0.05,
        drops={},
        statuses={},
        requests=[],
        hold=threading.Event(),
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.behaviour = behaviour
        behaviour.url = f"http://127.0.0.1:{running.server_port}/net.pkl"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield behaviour
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def online(monkeypatch):
    for name in ("D2O_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "PAUSE", 0.01)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "teachers" / "net.pkl"


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))


def test_a_file_is_fetched_once_and_recorded(server, path):
    seen = []
    assert (
        download(server.url, path, sha(CONTENT), len(CONTENT), lambda done, total: seen.append((done, total))) == path
    )
    assert path.read_bytes() == CONTENT
    assert names(path) == ["net.pkl", "net.pkl.json"]
    record = download_record(path)
    assert record.pop("date")[:2] == "20"
    assert record == {"url": server.url, "sha256": sha(CONTENT), "bytes": len(CONTENT), "checked": True}
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert download(server.url, path, sha(CONTENT)) == path and len(server.requests) == 1


def test_a_dropped_connection_is_continued_where_it_broke(server, path):
    server.drops = {0: 1_000_000, 1: 500_000}
    download(server.url, path, sha(CONTENT))
    assert path.read_bytes() == CONTENT
    starts = [int(r["Range"].removeprefix("bytes=").removesuffix("-")) for r in server.requests[1:]]
    assert len(starts) == 2 and all(r["If-Range"] == '"v1"' for r in server.requests[1:])
    assert (
        1_000_000 - BLOCK < starts[0] <= 1_000_000 and 500_000 - BLOCK < starts[1] - starts[0] <= 500_000
    )  # at most a block again


def test_server_errors_that_pass_are_waited_out(server, path):
    server.statuses = {0: 503, 1: 429}
    download(server.url, path)
    assert path.read_bytes() == CONTENT and len(server.requests) == 3


def interrupted(server, path, keep: int = 1_000_000) -> None:
    """What a killed process leaves after `keep` bytes of the present file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("net.pkl.part").write_bytes(server.content[:keep])
    note = {"url": server.url, "validator": server.etag, "total": len(server.content)}
    path.with_name("net.pkl.part.json").write_text(json.dumps(note))


def test_a_later_run_continues(server, path):
    interrupted(server, path)
    download(server.url, path)
    assert path.read_bytes() == CONTENT and server.requests[0]["Range"] == "bytes=1000000-"
    assert names(path) == ["net.pkl", "net.pkl.json"]
    assert download_record(path)["sha256"] == sha(CONTENT)


def test_a_part_that_was_whole_needs_no_request(server, path):
    interrupted(server, path, len(CONTENT))
    download(server.url, path)
    assert path.read_bytes() == CONTENT and not server.requests


@pytest.mark.parametrize("deaf", [False, True], ids=["server checks If-Range", "server ignores If-Range"])
def test_another_file_on_the_server_is_never_spliced(server, path, deaf):
    interrupted(server, path)
    server.content, server.etag, server.deaf = OTHER, '"v2"', deaf
    download(server.url, path)
    assert path.read_bytes() == OTHER


def test_a_shorter_file_on_the_server_starts_anew(server, path):
    interrupted(server, path)
    server.content, server.deaf = SHORTER, True  # the server answers 416
    download(server.url, path)
    assert path.read_bytes() == SHORTER


def test_a_server_without_ranges_starts_anew(server, path):
    interrupted(server, path)
    server.ranges, server.drops = False, {0: 2_000_000}
    download(server.url, path, sha(CONTENT))
    assert path.read_bytes() == CONTENT and len(server.requests) == 2


def test_without_an_etag_nothing_is_joined(server, path):
    server.etag, server.drops = None, {0: 2_000_000}
    download(server.url, path)
    assert path.read_bytes() == CONTENT and [r.get("Range") for r in server.requests] == [None, None]


def test_a_part_of_another_url_is_not_continued(server, path):
    interrupted(server, path)
    note = path.with_name("net.pkl.part.json")
    note.write_text(note.read_text().replace("net.pkl", "old.pkl"))
    download(server.url, path)
    assert "Range" not in server.requests[0] and path.read_bytes() == CONTENT


def test_a_server_that_promises_more_than_it_has_is_given_up(server, path):
    server.lie = 1000
    with pytest.raises(UserError) as error:
        download(server.url, path)
    assert f"cannot download {server.url}" in error.value.message and "put it at " + str(path) in error.value.hint
    assert not path.exists() and len(server.requests) < 20


def test_a_server_that_promises_less_than_it_sends_gives_no_file(server, path):
    server.lie = -1000  # the answer is cut at the stated length: only the checksum can tell
    with pytest.raises(UserError, match="not the expected file"):
        download(server.url, path, sha(CONTENT))
    assert names(path) == []


def test_an_answer_of_unknown_length_is_refused(server, path):
    server.length = False
    with pytest.raises(UserError, match="does not say how long"):
        download(server.url, path)
    assert not path.exists()
    server.drops = {1: 1_000_000}  # a known size tells the part from the whole
    download(server.url, path, size=len(CONTENT))
    assert path.read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, path):
    with pytest.raises(UserError) as error:
        download(server.url, path, sha(OTHER))
    assert (
        sha(CONTENT) in error.value.message and sha(OTHER) in error.value.message and server.url in error.value.message
    )
    assert names(path) == []


def test_a_damaged_part_is_found_out(server, path):
    interrupted(server, path)
    path.with_name("net.pkl.part").write_bytes(bytes(1_000_000))
    with pytest.raises(UserError, match="not the expected file"):
        download(server.url, path, sha(CONTENT))
    download(server.url, path, sha(CONTENT))  # from the start
    assert path.read_bytes() == CONTENT


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, path):
    with pytest.raises(UserError, match="3,000,000 bytes, expected 123"):
        download(server.url, path, size=123)
    assert names(path) == []


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no such file"), (403, "refuses access"), (401, "login"), (410, "410 Gone")]
)
def test_a_refusal_is_final_and_says_where_to_put_the_file(server, path, status, words):
    server.statuses = {0: status}
    with pytest.raises(UserError) as error:
        download(server.url, path)
    assert words in error.value.message and server.url in error.value.message
    assert error.value.hint == f"download it by other means and put it at {path}"
    assert len(server.requests) == 1 and names(path) == []


def test_a_server_that_is_not_there(path):
    with pytest.raises(UserError) as error:
        download("http://127.0.0.1:9/net.pkl", path)
    assert "refused" in error.value.message and f"put it at {path}" in error.value.hint


def test_a_server_that_falls_silent(server, path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", (0.2, 0.2))
    monkeypatch.setattr(transfer, "TRIES", 2)
    server.pause = 1.0
    server.hold.set()
    with pytest.raises(UserError, match="sent nothing for"):
        download(server.url, path)
    assert not path.exists()
    server.hold.clear()
    download(server.url, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["D2O_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(server, path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError) as error:
        download(server.url, path)
    assert f"switched off ({name}=1)" in error.value.message and str(path) in error.value.hint and not server.requests
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)  # as the message says
    assert download(server.url, path) == path
    monkeypatch.setenv(name, "0")
    assert offline() is None


def test_a_full_disk_is_known_beforehand(server, path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="3,000,000 more bytes are needed, and the disk has 1,000 free"):
        download(server.url, path)
    assert not path.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_disk_that_fills_up_underway(server, path):
    path.parent.mkdir(parents=True)
    path.with_name("net.pkl.part").symlink_to("/dev/full")
    with pytest.raises(UserError) as error:
        download(server.url, path)
    assert "the disk is full" in error.value.message and "D2O_HOME" in error.value.hint
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "shared").mkdir(mode=0o555)
    with pytest.raises(UserError, match="permission denied"):
        download(server.url, tmp_path / "shared" / "net.pkl")


def test_a_file_in_place_of_a_folder(server, tmp_path):
    (tmp_path / "teachers").write_text("")
    with pytest.raises(UserError, match="in the way|a part of the path is a file"):
        download(server.url, tmp_path / "teachers" / "net.pkl")


def test_first_seen_is_pinned(server, path):
    download(server.url, path)
    assert download_record(path)["checked"] is False
    assert verify_file(path) == path
    path.write_bytes(OTHER)
    with pytest.raises(UserError, match="damaged or another file: sha256"):
        download(server.url, path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="has 2,999,999 bytes, expected 3,000,000"):
        verify_file(path)
    path.unlink()
    server.content, server.etag = OTHER, '"v2"'
    with pytest.raises(UserError) as error:
        download(server.url, path)
    assert (
        sha(CONTENT) in error.value.message
        and "remove " + str(path) + ".json" in error.value.hint
        and not path.exists()
    )
    path.with_name("net.pkl.json").unlink()
    assert download(server.url, path).read_bytes() == OTHER


def test_a_file_put_there_by_hand(server, path):
    path.parent.mkdir(parents=True)
    path.write_bytes(OTHER)
    assert download(server.url, path) == path and not server.requests and download_record(path) is None
    with pytest.raises(UserError, match="damaged or another file"):  # where the checksum is known it counts
        download(server.url, path, sha(CONTENT))
    with pytest.raises(UserError, match="is missing"):
        verify_file(path.with_name("absent"))
    with pytest.raises(UserError, match="is a folder"):
        verify_file(path.parent)


def test_other_protocols(tmp_path, path, monkeypatch):
    monkeypatch.setenv("D2O_OFFLINE", "1")
    (tmp_path / "source.pkl").write_bytes(CONTENT)
    url = f"file://{tmp_path}/source.pkl"
    assert download(url, path, sha(CONTENT), len(CONTENT)).read_bytes() == CONTENT
    with pytest.raises(UserError, match="expected 5"):
        download(url, path.with_name("b.pkl"), size=5)
    with pytest.raises(UserError, match="no such file") as error:
        download(f"file://{tmp_path}/absent.pkl", path.with_name("c.pkl"))
    assert str(path.with_name("c.pkl")) in error.value.hint
    with pytest.raises(UserError, match="switched off"):
        download("s3://bucket/net.pkl", path.with_name("d.pkl"))
    monkeypatch.delenv("D2O_OFFLINE")
    with pytest.raises(UserError, match="cannot download nonsense://x/y"):
        download("nonsense://x/y", path.with_name("e.pkl"))
    with pytest.raises(UserError, match="cannot download http://"):
        download("http://", path.with_name("f.pkl"))
    assert names(path) == ["net.pkl", "net.pkl.json"]


def test_home(monkeypatch, tmp_path):
    for name in ("D2O_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "d2o"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert home() == tmp_path / "x" / "d2o"
    monkeypatch.setenv("D2O_HOME", "~/teachers")
    assert home() == tmp_path / "teachers"


def _download(url: str, path: str) -> None:
    for name in ("D2O_OFFLINE", "HF_HUB_OFFLINE"):
        os.environ.pop(name, None)
    module.download(url, path)


def start(server, path):
    process = CONTEXT.Process(target=_download, args=(server.url, str(path)))
    process.start()
    return process


def test_kill_and_continue(server, path):
    part = path.with_name("net.pkl.part")
    server.hold.set()
    process = start(server, path)
    wait_for(lambda: part.exists() and part.stat().st_size >= 1_000_000)
    process.kill()
    assert finish(process) == -signal.SIGKILL
    kept = part.stat().st_size
    assert not path.exists() and 1_000_000 <= kept < len(CONTENT)
    server.hold.clear()
    download(server.url, path)
    assert path.read_bytes() == CONTENT and server.requests[1]["Range"] == f"bytes={kept}-"


def test_two_processes_fetch_one_file_once(server, path):
    server.hold.set()
    processes = [start(server, path) for _ in range(2)]
    assert [finish(p) for p in processes] == [0, 0]
    assert path.read_bytes() == CONTENT and len(server.requests) == 1
    assert names(path) == ["net.pkl", "net.pkl.json"]


def test_the_waiting_process_takes_over_from_a_killed_one(server, path):
    part = path.with_name("net.pkl.part")
    server.hold.set()
    first = start(server, path)
    wait_for(lambda: part.exists() and part.stat().st_size >= 500_000)
    second = start(server, path)
    time.sleep(0.3)
    assert len(server.requests) == 1  # it waits
    first.kill()
    server.hold.clear()
    assert finish(second) == 0
    assert path.read_bytes() == CONTENT and server.requests[1]["Range"].startswith("bytes=")


# What nobody published a sha256 of


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pkl", b"", "it is empty"),
        ("a.pkl", b"\n<!DOCTYPE html><html>please log in</html>", "0 bytes came|web page"),
        ("a.safetensors", b"<html>" + bytes(2000), "web page"),
        ("a.pkl", CONTENT[:-1], "truncated"),
        ("a.npz", CONTENT, "not an npz file"),
        ("a.pth", b"PK\3\4" + bytes(5000), "cut off or damaged"),
        ("a.safetensors", (2**40).to_bytes(8, "little") + b"{}" + bytes(600), "its header says that it has"),
        (
            "a.safetensors",
            (64).to_bytes(8, "little") + b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.ljust(64) + b"abc",
            "promises 4",
        ),
        ("a.parquet", b"PAR1" + bytes(600), "without its end"),
        ("a.txt", b"a prompt\0", "no text"),
    ],
)
def test_what_does_not_parse_is_neither_kept_nor_pinned(server, tmp_path, name, content, words):
    server.content = content
    path = tmp_path / "weights" / name
    with pytest.raises(UserError, match=words) as error:
        download(server.url, path)
    assert str(path) in error.value.hint and names(path) == [] and len(server.requests) == 1


def test_a_login_page_is_given_up_at_its_first_bytes(server, path, monkeypatch):
    server.content = b"<html>" + bytes(50_000_000)
    seen = []
    with pytest.raises(UserError, match="web page"):
        download(server.url, path, progress=lambda done, total: seen.append(done))
    assert not seen and names(path) == []


def test_a_server_that_drips_is_given_up(server, path, monkeypatch):
    monkeypatch.setattr(transfer, "SLOWEST", (1e9, 0.05))
    server.hold.set()  # 2 MB/s
    with pytest.raises(UserError, match=r"sent only [\d,]+ bytes in 0 seconds"):
        monkeypatch.setattr(transfer, "TRIES", 1)
        download(server.url, path)
    assert not path.exists()
    monkeypatch.setattr(transfer, "SLOWEST", (1000, 0.05))
    download(server.url, path, sha(CONTENT))
    assert path.read_bytes() == CONTENT and "Range" in server.requests[-1]


class Endless(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")

    def log_message(self, *_):
        pass


def test_an_endless_body_ends_at_the_limit(path, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_UNDECLARED", 1_000_000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        with pytest.raises(UserError, match="sent more than 1,000,000 bytes"):
            download(f"http://127.0.0.1:{running.server_port}/weights", path.with_suffix(""))
        running.shutdown()
        thread.join()
    assert names(path) == []


def test_a_length_beyond_all_limits_is_refused(server, path):
    server.lie = 2**50
    with pytest.raises(UserError, match="the limit is 137,438,953,472"):
        download(server.url, path)
    assert names(path) == []
