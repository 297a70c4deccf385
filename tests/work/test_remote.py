"""Folders on object stores: whoever fills them, however often they are killed, the end is what one worker makes on a
disk."""

import datetime
import json
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from d2o.errors import UserError
from d2o.interop.safetensors_io import load_file
from d2o.work import claims
from d2o.work.base import dump_manifest
from d2o.work.folder import Unit, Vanished, WorkFolder, cut
from d2o.work.remote import RemoteFolder, open_folder
from tests.workers import REMOTE_MANIFEST, TIMES, files, fill_folder, finish, start_remote, wait_for

UNITS = cut(50, 5, "u{:05d}.safetensors")
QUICK = {**TIMES, "settle": 0.0}


@pytest.fixture
def path():
    """A folder of fsspec's memory file system, which is one for the whole process."""
    path = f"/{uuid.uuid4().hex}"
    yield path
    fs = MemoryFileSystem()
    if fs.exists(path):
        fs.rm(path, recursive=True)


@pytest.fixture
def remote(path, tmp_path):
    """remote(**times) -> another worker's view of the same folder."""
    return lambda fs=None, **times: RemoteFolder(
        fs or MemoryFileSystem(), path, "test", "files", cache=tmp_path / "cache", **{**QUICK, **times}
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The files that one worker makes on a disk."""
    path = tmp_path_factory.mktemp("reference") / "folder"
    fill_folder(WorkFolder(path, "test", "files"), UNITS)
    return files(path)


def contents(path):
    fs = MemoryFileSystem()
    return {name[len(path) + 1 :]: fs.cat_file(name) for name in fs.find(path)}


def entry(unit, size=10, sha256="0" * 64):
    return {"file": unit.file, "start": unit.start, "n": unit.n, "bytes": size, "sha256": sha256}


# Where a folder lies


def test_urls_choose_the_kind_of_folder(tmp_path):
    for local in (tmp_path / "a", str(tmp_path / "a"), f"file://{tmp_path}/a", "a/b"):
        assert isinstance(open_folder(local, "test", "files"), WorkFolder)
    assert open_folder(f"file://{tmp_path}/a", "test", "files").path == tmp_path / "a"
    folder = open_folder("memory://bucket/a/", "test", "files")
    assert isinstance(folder, RemoteFolder) and folder.url == "memory://bucket/a"
    assert (
        open_folder(Path("memory://bucket/a"), "test", "files").url == "memory://bucket/a"
    )  # Path has made one slash of two


@pytest.mark.parametrize(
    "url, words",
    [("oci://b/x", "pip install ocifs"), ("sftp://h/x", "paramiko"), ("nonsense://x", "Protocol not known")],
)
def test_a_missing_backend_says_what_to_install(url, words):
    with pytest.raises(UserError, match=words):
        open_folder(url, "test", "files")


# One worker


def test_a_filled_folder_is_that_of_a_disk(remote, path, reference):
    fill_folder(remote(), UNITS)
    assert contents(path) == reference


def test_files_are_saved_and_fetched_whole(remote, path, tmp_path):
    folder, disk = remote(), WorkFolder(tmp_path / "disk", "test", "files")
    tensors = {"x": torch.arange(6.0).view(2, 3)}
    assert folder.save("x.safetensors", tensors, {"k": 1}) == disk.save("x.safetensors", tensors, {"k": 1})
    assert contents(path)["x.safetensors"] == (disk.path / "x.safetensors").read_bytes()
    size = folder.size("x.safetensors")
    assert size == disk.size("x.safetensors") > 0 and folder.exists("x.safetensors")
    assert folder.size("y.safetensors") == disk.size("y.safetensors") == -1 and not folder.exists("y.safetensors")
    assert folder.sha256("x.safetensors") == disk.sha256("x.safetensors")
    assert torch.equal(load_file(folder.local("x.safetensors"))[0]["x"], tensors["x"])


def test_a_copy_is_kept_by_its_content(remote, path):
    unit, fs = Unit("u0.safetensors", 0, 5), MemoryFileSystem()
    for value in (1.0, 2.0):  # of the same size
        folder = remote()
        folder.open(REMOTE_MANIFEST)
        folder.add(entry(unit) | folder.save(unit.file, {"x": torch.full((5,), value)}, {}))
        first = folder.local(unit.file)
        assert load_file(first)[0]["x"][0] == value
        kept = fs.cat_file(f"{path}/{unit.file}")
        fs.pipe_file(f"{path}/{unit.file}", b"not read again")
        assert remote().local(unit.file) == first and load_file(first)[0]["x"][0] == value
        fs.pipe_file(f"{path}/{unit.file}", kept)


def test_a_file_that_is_not_what_the_manifest_says_is_refused(remote, path):
    unit, folder = Unit("u0.safetensors", 0, 5), remote()
    folder.open(REMOTE_MANIFEST)
    saved = folder.save(unit.file, {"x": torch.ones(5)}, {})
    folder.add(entry(unit) | saved)
    MemoryFileSystem().pipe_file(f"{path}/{unit.file}", b"?" * saved["bytes"])
    with pytest.raises(UserError, match=r"u0.safetensors: its checksum differs"):
        remote().local(unit.file)
    MemoryFileSystem().pipe_file(f"{path}/{unit.file}", b"?")
    with pytest.raises(UserError, match=f"has 1 bytes instead of {saved['bytes']}"):
        remote().local(unit.file)
    with pytest.raises(UserError, match="no such file"):
        remote().local("other.safetensors")


def test_foreign_files_are_refused(remote, path):
    MemoryFileSystem().pipe_file(f"{path}/thesis.tex", b"!")
    with pytest.raises(UserError, match=r"holds files that are not of a test folder \(thesis.tex\)"):
        remote().open(REMOTE_MANIFEST)
    MemoryFileSystem().pipe_file(f"{path}/manifest.json", b'{"format": "other", "version": 1, "files": []}')
    with pytest.raises(UserError, match="does not belong to a test folder"):
        remote().open(REMOTE_MANIFEST)
    MemoryFileSystem().pipe_file(f"{path}/manifest.json", b'{"form')
    with pytest.raises(UserError, match="manifest.json is damaged: it is not JSON"):
        remote().open(REMOTE_MANIFEST)


def test_a_file_in_place_of_the_folder_is_refused(remote, path):
    MemoryFileSystem().pipe_file(path, b"!")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        remote().open(REMOTE_MANIFEST)


def test_what_the_backend_says_is_passed_on(remote, path):
    class Locked(MemoryFileSystem):
        cachable = False

        def pipe_file(self, *args, **kwargs):
            raise PermissionError("Access Denied: no PutObject")

        def cat_file(self, *args, **kwargs):
            raise RuntimeError("token expired")

    with pytest.raises(UserError, match="cannot write .*/x.safetensors: Access Denied: no PutObject"):
        remote(Locked()).save("x.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(UserError, match="cannot read .*/manifest.json: token expired"):
        remote(Locked()).manifest()


def test_notes_are_statistics_only(remote, path, tmp_path):
    for folder in (remote(), WorkFolder(tmp_path / "disk", "test", "files")):
        folder.note("host b/2", {"pairs": 2})
        folder.note("host a/1", {"pairs": 1})
        folder.open(REMOTE_MANIFEST)  # though the folder is not empty
        assert folder.notes() == [{"pairs": 1}, {"pairs": 2}]
    MemoryFileSystem().pipe_file(f"{path}/timing/broken.json", b"{")
    assert remote().notes() == [{"pairs": 1}, {"pairs": 2}]


def test_a_folder_that_vanishes_is_noticed(remote, path):
    folder = remote()
    folder.open(REMOTE_MANIFEST)
    MemoryFileSystem().rm(path, recursive=True)
    with pytest.raises(Vanished):
        folder.left(UNITS)


# Entries and the manifest


def test_entries_count_before_and_after_they_are_in_the_manifest(remote, path):
    folder, units = remote(), UNITS[:4]
    folder.open(REMOTE_MANIFEST)
    for unit in (units[2], units[0]):
        folder.add(entry(unit))
    assert list(remote().recorded()) == [units[0].file, units[2].file]
    folder.close()
    assert set(contents(path)) == {"manifest.json"}
    remote().add(entry(units[1]))
    remote().add(entry(units[0], size=11))  # made again
    for _ in range(2):
        assert [(e["file"], e["bytes"]) for e in remote().manifest()["files"]] == [
            (units[0].file, 11),
            (units[1].file, 10),
            (units[2].file, 10),
        ]
        remote().close()
    assert set(contents(path)) == {"manifest.json"}


def test_a_unit_is_left_until_its_whole_file_is_there(remote, path):
    folder, fs = remote(), MemoryFileSystem()
    folder.open(REMOTE_MANIFEST)
    folder.add(entry(UNITS[0]))
    assert folder.left(UNITS[:2]) == UNITS[:2]
    fs.pipe_file(f"{path}/{UNITS[0].file}", b"0123456789")
    assert folder.left(UNITS[:2]) == UNITS[1:2]
    fs.pipe_file(f"{path}/{UNITS[0].file}", b"012345")
    assert folder.left(UNITS[:2]) == UNITS[:2]


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"file": "u00000.safetensors"}',
    b'{"file": "u00001.safetensors", "start": 0, "n": 5, "bytes": 9}',
    b'{"file": "u00000.safetensors", "start": "0", "n": 5, "bytes": 9}',
    b"\xff\xfe",
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_entry_is_no_entry(remote, path, reference, damage):
    folder = remote()
    folder.open(REMOTE_MANIFEST)
    MemoryFileSystem().pipe_file(f"{path}/entries/u00000.json", damage)
    MemoryFileSystem().pipe_file(f"{path}/entries/nobody.json", damage)
    assert folder.recorded() == {}
    fill_folder(folder, UNITS)
    assert contents(path) == reference


@pytest.mark.parametrize("operation", ["pipe_file", "cat_file", "rm_file"])
def test_closing_may_break_off_anywhere(remote, path, reference, operation):
    class Breaking(MemoryFileSystem):
        cachable = False
        left = 10**9

        def _step(self, name):
            if name == operation:
                Breaking.left -= 1
                if Breaking.left < 0:
                    raise ConnectionError("the network is down")

        def pipe_file(self, *args, **kwargs):
            self._step("pipe_file")
            return super().pipe_file(*args, **kwargs)

        def cat_file(self, *args, **kwargs):
            self._step("cat_file")
            return super().cat_file(*args, **kwargs)

        def rm_file(self, *args, **kwargs):
            self._step("rm_file")
            return super().rm_file(*args, **kwargs)

    fill_folder(remote(), UNITS)
    manifest = json.loads(contents(path)["manifest.json"])
    files, broken = manifest.pop("files"), 0
    del manifest["sha256"]
    for steps in range(30):
        Breaking.left = 10**9
        folder = remote(Breaking())
        MemoryFileSystem().pipe_file(f"{path}/manifest.json", dump_manifest({**manifest, "files": []}).encode())
        for e in files:
            folder.add(e)
        Breaking.left = steps
        try:
            folder.close()
        except UserError:
            broken += 1
            assert remote().manifest() == {**manifest, "files": files}  # nothing is lost, nothing is there twice
            assert remote().left(UNITS) == []
            remote().close()
        assert contents(path) == reference
    assert broken > 0


@pytest.mark.long
def test_two_may_close_at_the_same_time(remote, path, reference):
    """Each operation of the first is followed by the whole of the second."""

    class Interleaved(MemoryFileSystem):
        cachable = False
        at = 0

        def _step(self):
            Interleaved.at -= 1
            if Interleaved.at == 0:
                remote().close()

        def pipe_file(self, *args, **kwargs):
            self._step()
            return super().pipe_file(*args, **kwargs)

        def cat_file(self, *args, **kwargs):
            self._step()
            return super().cat_file(*args, **kwargs)

        def ls(self, *args, **kwargs):
            self._step()
            return super().ls(*args, **kwargs)

        def rm_file(self, *args, **kwargs):
            self._step()
            return super().rm_file(*args, **kwargs)

    fill_folder(remote(), UNITS)
    manifest = json.loads(contents(path)["manifest.json"])
    for at in range(1, 40):
        MemoryFileSystem().pipe_file(f"{path}/manifest.json", dump_manifest({**manifest, "files": []}).encode())
        for e in manifest["files"]:
            remote().add(e)
        Interleaved.at = at
        remote(Interleaved()).close()
        assert contents(path) == reference


def test_two_may_begin_at_the_same_time(remote, path):
    """Both see an empty folder and write; both go on with what was written last."""
    records = [{**REMOTE_MANIFEST, "settings": {"seed": seed}} for seed in range(3)]
    found, ready = [], threading.Barrier(3)

    class Together(MemoryFileSystem):
        cachable = False

        def pipe_file(self, *args, **kwargs):
            ready.wait(5)
            return super().pipe_file(*args, **kwargs)

    threads = [
        threading.Thread(target=lambda r=r: found.append(remote(Together(), settle=0.2).open(r))) for r in records
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2] and found[0] in records


def test_a_manifest_that_was_begun_anew_stops_those_who_work_by_the_old_one(remote, path):
    folder = remote()
    folder.open(REMOTE_MANIFEST)
    MemoryFileSystem().pipe_file(
        f"{path}/manifest.json", dump_manifest({**REMOTE_MANIFEST, "settings": {"seed": 4}}).encode()
    )
    with pytest.raises(UserError, match="manifest.json has changed meanwhile"):
        folder.add(entry(UNITS[0]))


# Claims


def test_a_claim_is_exclusive_until_released(remote, path):
    one, other = remote(), remote()
    held = one.claim("a")
    assert one.claim("a") is None and other.claim("a") is None and other.claim("b") is not None
    held.release()
    again = other.claim("a")
    assert again is not None and one.claim("a") is None
    held.release()  # late: it is not ours any more
    assert one.claim("a") is None
    with other.locked("c"):
        assert one.claim("c") is None
    assert one.claim("c") is not None


def test_a_living_worker_keeps_its_claim_and_a_dead_one_loses_it(remote, monkeypatch):
    one, other = remote(), remote()
    assert one.claim("a") is not None
    end = time.monotonic() + 2 * TIMES["expiry"]
    while time.monotonic() < end:
        assert other.claim("a") is None
        time.sleep(0.05)
    monkeypatch.setattr(one.claims, "_write", lambda name: None)  # its heart stops
    start = time.monotonic()
    wait_for(lambda: other.claim("a") is not None, 5)
    assert time.monotonic() - start > TIMES["expiry"] / 2
    wait_for(lambda: not one.claims._held["a"], 5)  # it notices
    assert one.claim("a") is None


def test_of_two_that_claim_at_once_one_has_it(remote):
    for _ in range(10):
        won, ready = [], threading.Barrier(4)

        def work(ready=ready, won=won):
            folder = remote(settle=0.05)
            ready.wait(5)
            won.append(folder.claim("a"))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [claim for claim in won if claim is not None]
        assert len(held) == 1
        held[0].release()


class Skewed(MemoryFileSystem):
    """A store whose clock is an hour off."""

    cachable = False
    hours = 1

    def modified(self, path):
        return super().modified(path) + datetime.timedelta(hours=self.hours)


class Timeless(MemoryFileSystem):
    cachable = False

    def modified(self, path):
        raise NotImplementedError


@pytest.mark.parametrize("hours", [1, -1])
def test_clocks_may_differ(remote, path, hours):
    fs = Skewed()
    fs.hours = hours
    held = remote(fs).claim("a")
    assert held is not None and remote(fs).claim("a") is None
    dead = remote(fs)
    dead.objects.put("claims/b.json", b'{"worker": "dead", "time": 0}')
    assert remote(fs, expiry=60).claim("b") is None
    time.sleep(TIMES["expiry"] + 0.1)
    assert remote(fs).claim("b") is not None  # at once: it had expired by the store's clock
    assert not any("clock" in name for name in contents(path))


def test_without_times_of_the_store_those_in_the_claims_count(remote, path):
    fs, other = MemoryFileSystem(), remote(Timeless())
    assert remote(Timeless()).claim("a") is not None and other.claim("a") is None
    fs.pipe_file(f"{path}/claims/b.json", json.dumps({"worker": "dead", "time": time.time() - 10}).encode())
    assert other.claim("b") is not None
    # From a machine whose clock is ahead, or damaged: void once it was watched for long enough.
    for name, claim in (("c", json.dumps({"worker": "dead", "time": time.time() + 3600}).encode()), ("d", b"{")):
        fs.pipe_file(f"{path}/claims/{name}.json", claim)
        assert other.claim(name) is None
    time.sleep(TIMES["expiry"] + 0.1)
    assert other.claim("c") is not None and other.claim("d") is not None


def test_a_claim_survives_a_network_that_comes_and_goes(remote, monkeypatch):
    one, other = remote(), remote()
    write, fail = claims.Claims._write, True

    def sometimes(self, name):
        if fail and self is one.claims and name in one.claims._held and one.claims._held[name]:
            raise UserError("the network is down")
        write(self, name)

    monkeypatch.setattr(claims.Claims, "_write", sometimes)
    assert one.claim("a") is not None
    time.sleep(2.5 * TIMES["beat"])
    fail = False
    end = time.monotonic() + 2 * TIMES["expiry"]
    while time.monotonic() < end:
        assert other.claim("a") is None
        time.sleep(0.05)


# Several workers


def test_workers_in_threads_share_the_units(remote, path, reference):
    began = []
    workers = [
        threading.Thread(target=fill_folder, args=(remote(settle=0.02), UNITS, 0.02), kwargs={"say": began.append})
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert contents(path) == reference
    assert sorted(set(began)) == [unit.file for unit in UNITS] and len(began) < 2 * len(UNITS)  # double work is rare


def test_a_killed_process_is_replaced_by_another(tmp_path, reference):
    out, logs = tmp_path / "out", [tmp_path / "log0", tmp_path / "log1"]
    first = start_remote(out, UNITS, logs[0], pause=0.05, die_at=3)
    wait_for(logs[0].exists)
    second = start_remote(out, UNITS, logs[1], pause=0.05)
    assert finish(first) == -signal.SIGKILL and finish(second) == 0
    assert files(out) == reference
    lost = logs[0].read_text().split()[-1]
    assert lost in logs[1].read_text().split()  # it was being made when the worker died


def test_processes_that_start_and_end_together(tmp_path, reference):
    out, logs = tmp_path / "out", [tmp_path / f"log{i}" for i in range(3)]
    workers = [start_remote(out, UNITS, log, pause=0.03) for log in logs]
    assert [finish(worker) for worker in workers] == [0, 0, 0]
    assert files(out) == reference
    assert RemoteFolder(LocalFileSystem(), str(out), "test", "files").left(UNITS) == []
    assert all(len(log.read_text().split()) < len(UNITS) for log in logs if log.exists())  # nobody made everything
