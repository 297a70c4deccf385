"""Sharing a folder between workers, and doing the next thing while the last is written."""

import threading
import time

import pytest
import torch

from d2o.errors import UserError
from d2o.interop.safetensors_io import file_sha256, load_file, save_file
from d2o.work.folder import BEHIND, Ahead, Unit, Vanished, WorkFolder, cut, fill

MANIFEST = {"format": "test", "version": 1, "files": []}


@pytest.fixture
def folder(tmp_path):
    folder = WorkFolder(tmp_path / "work", "test", "files")
    folder.open(MANIFEST)
    return folder


def write(folder):
    def run(unit, payload):
        (folder.path / unit.file).write_text(payload)
        return {"file": unit.file, "start": unit.start, "n": unit.n, "bytes": len(payload)}

    return run


def test_cut_covers_everything_once():
    assert cut(7, 3, "u{}") == [Unit("u0", 0, 3), Unit("u1", 3, 3), Unit("u2", 6, 1)]


def test_a_claim_is_exclusive_until_released(folder):
    lock = folder.claim("a")
    assert folder.claim("a") is None and folder.claim("b") is not None
    lock.release()
    assert folder.claim("a") is not None


def test_the_manifest_is_written_once_and_kept_in_order(folder):
    assert folder.open({**MANIFEST, "late": True}) == MANIFEST
    for start in (3, 0):
        folder.add({"file": f"u{start}", "start": start, "n": 3, "bytes": start})
    folder.add({"file": "u3", "start": 3, "n": 3, "bytes": 7})
    assert [(entry["file"], entry["bytes"]) for entry in folder.manifest()["files"]] == [("u0", 0), ("u3", 7)]


def test_a_unit_is_left_until_its_whole_file_is_there(folder):
    units = cut(4, 2, "u{}")
    folder.add(write(folder)(units[0], "abc"))
    assert folder.left(units) == units[1:]
    (folder.path / "u0").write_text("ab")
    assert folder.left(units) == units


def test_files_are_saved_whole_and_described(folder, tmp_path):
    tensors = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(3, dtype=torch.bfloat16)}
    saved = folder.save("u0.safetensors", tensors, {"b": 1, "a": 2})
    save_file(tmp_path / "same.safetensors", tensors, {"a": 2, "b": 1})
    path = folder.local("u0.safetensors")
    assert path.read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    assert (
        saved == {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        and folder.sha256("u0.safetensors") == saved["sha256"]
    )
    assert torch.equal(load_file(path)[0]["x"], tensors["x"])
    assert folder.size("u0.safetensors") == saved["bytes"] and folder.exists("u0.safetensors")
    assert folder.size("u1.safetensors") == -1 and not folder.exists("u1.safetensors")
    assert folder.sizes(["u1.safetensors", "u0.safetensors"]) == {
        "u0.safetensors": saved["bytes"],
        "u1.safetensors": -1,
    }
    with pytest.raises(UserError, match="cannot read .*u1.safetensors"):
        folder.sha256("u1.safetensors")


def test_a_file_that_cannot_be_written_leaves_no_trace(folder):
    (folder.path / "u0").mkdir()
    with pytest.raises(UserError, match="cannot write .*u0: a folder of that name is in the way"):
        folder.save("u0", {"x": torch.ones(1)}, {})
    assert sorted(p.name for p in folder.path.iterdir() if p.name != ".locks") == ["manifest.json", "u0"]


def test_notes_lie_beside_the_work_and_never_stop_it(tmp_path):
    folder = WorkFolder(tmp_path / "work", "test", "files")
    folder.note("node7/rank 1", {"pairs": 3})
    assert [p.name for p in (folder.path / "timing").iterdir()] == ["node7-rank-1.json"]
    folder.open(MANIFEST)  # a folder with nothing but notes is as good as empty
    folder.note("node7/rank 1", {"pairs": 4})
    folder.note("node6", {"pairs": 1})
    (folder.path / "timing" / "node5.json").write_text("{")
    assert folder.notes() == [{"pairs": 1}, {"pairs": 4}]
    blocked = WorkFolder(tmp_path / "file", "test", "files")
    (tmp_path / "file").write_text("")
    blocked.note("a", {})
    assert blocked.notes() == []


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("!")
    with pytest.raises(UserError, match=r"holds files that are not of a test folder \(thesis.tex\)"):
        WorkFolder(tmp_path, "test", "files").open(MANIFEST)


def test_writing_overlaps_making_within_bounds(folder):
    made, written, most = [], [], 0

    def make(unit, done):
        nonlocal most
        made.append(unit.file)
        most = max(most, len(made) - len(written))
        return "x"

    def slow(unit, payload):
        time.sleep(0.02)
        entry = write(folder)(unit, payload)
        written.append(unit.file)
        return entry

    assert fill(folder, cut(8, 1, "u{}"), make, slow)
    assert made == written == [f"u{i}" for i in range(8)]
    assert 2 <= most <= BEHIND + 2  # those that wait, the one being written, the one being made


def test_threads_share_the_units(folder):
    units, makers = cut(12, 1, "u{:02d}"), []

    def work():
        def make(unit, done):
            makers.append((unit.file, threading.get_ident()))
            time.sleep(0.01)
            return "x"

        assert fill(folder, units, make, write(folder))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(file for file, _ in makers) == [unit.file for unit in units]  # each once
    assert len({ident for _, ident in makers}) > 1


def test_done_counts_what_others_made_and_what_waits_for_the_disk(folder):
    units, counts = cut(10, 2, "u{}"), []
    folder.add(write(folder)(units[3], "y"))

    def make(unit, done):
        counts.append(done)
        return "x"

    fill(folder, units, make, write(folder))
    assert counts == [2, 4, 6, 8]


def test_an_error_of_the_writer_reaches_the_caller_and_frees_the_locks(folder):
    def fail(unit, payload):
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        fill(folder, cut(5, 1, "u{}"), lambda unit, done: "x", fail)
    assert all(folder.claim(f"u{i}") is not None for i in range(5))


def test_a_folder_that_vanishes_is_noticed(folder):
    def make(unit, done):
        (folder.path / "manifest.json").unlink()
        return "x"

    with pytest.raises(Vanished):
        fill(folder, cut(3, 1, "u{}"), make, write(folder))


def test_ahead_keeps_the_order_and_computes_one_in_advance():
    begun = []

    def double(x):
        begun.append(x)
        return 2 * x

    results = Ahead(double, [1, 2, 3])
    assert next(results) == 2
    time.sleep(0.05)
    assert begun == [1, 2]
    assert list(results) == [4, 6] and list(Ahead(double, [])) == []


@pytest.mark.parametrize("depth, most", [(0, 1), (1, 2), (3, 4)])
def test_ahead_is_no_further_ahead_than_it_should(depth, most):
    begun = []

    def note(x):
        begun.append(x)
        return x

    results = Ahead(note, range(100), depth)
    for k in range(5):
        assert next(results) == k
        time.sleep(0.02)
        assert len(begun) == k + most
    before = threading.active_count()
    results.close()
    assert len(begun) <= 4 + most and threading.active_count() == before - (depth > 0)


def test_ahead_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        list(Ahead(lambda x: 1 // x, [1, 0]))
