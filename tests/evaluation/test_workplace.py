"""Where an evaluation keeps its work: nothing is lost before the results are there, nothing stays after, and nothing
can block the next one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d2o.errors import UserError
from d2o.evaluation import workplace as module
from d2o.evaluation.columns import Columns
from d2o.evaluation.workplace import Workplace
from d2o.runtime import StopFlag, Stopped
from tests.evaluation.test_collect import numbered


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """d2o's own folder for evaluations."""
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "eval"


def gather(place: Workplace, **more) -> Columns:
    return place.collect(numbered(**more), lambda done: None)


def evaluate(results: Path, calls: list[range] | None = None) -> None:
    """What `d2o eval` does: measure, write the results, leave."""
    with Workplace() as place:
        columns = gather(place, n=300, calls=calls)
        temporary = results.with_name(".r.json.tmp")
        temporary.write_text(json.dumps([columns.column("number").tolist(), columns.seconds]))
        os.replace(temporary, results)


def in_a_child(work: Callable[[], None]) -> int:
    """Its exit code."""
    if (child := os.fork()) == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Run it in a child that dies before its file-system operation of that number; False if it has fewer."""
    changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}

    def run() -> None:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            count += event in changes or (
                event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            )
            if count == number:
                os._exit(9)  # no clean-up, as after a SIGKILL

        sys.addaudithook(hook)
        work()

    return in_a_child(run) == 9


@pytest.mark.long
def test_killed_anywhere_at_its_end_it_loses_nothing_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    evaluate(tmp_path / "whole.json")
    with pytest.raises(RuntimeError), Workplace() as place:  # killed with all images measured
        gather(place, n=300)
        raise RuntimeError
    shutil.copytree(root, tmp_path / "measured")
    number, results = 0, tmp_path / "results.json"
    while True:
        number += 1
        results.unlink(missing_ok=True)
        shutil.copytree(tmp_path / "measured", root, dirs_exist_ok=True)
        if not killed_at(number, lambda: evaluate(results)):
            break
        calls: list[range] = []
        had = results.exists()
        evaluate(results, calls)
        assert results.read_bytes() == (tmp_path / "whole.json").read_bytes(), number
        assert not list(root.iterdir()), number
        assert had or not calls, number  # lost: measured, and neither results nor work left
    assert number > 15


def test_the_work_stays_until_the_results_are_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), Workplace() as place:
        gather(place)
        raise OSError("the disk is full")
    (kept,) = root.iterdir()
    calls: list[range] = []
    with Workplace() as place:
        gather(place, calls=calls)
        assert not calls and kept.exists()
    assert not list(root.iterdir())


def test_work_is_kept_where_the_user_says(tmp_path: Path) -> None:
    with Workplace(tmp_path / "mine") as place:
        gather(place)
    assert len(list((tmp_path / "mine").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to") as caught:
        Workplace(tmp_path / "file" / "work")
    assert "--work" in caught.value.hint


def test_forgotten_work_goes(root: Path) -> None:
    old, new = root / "old", root / "new"
    for path in (old, new):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - module.OLD - 60,) * 2)
    Workplace()
    assert not old.exists() and new.exists()


def test_the_same_evaluation_beside_it_keeps_its_work(root: Path) -> None:
    """The one that is done first leaves the folder to the other; the last one removes it."""
    with Workplace() as slower:
        columns = gather(slower)
        with Workplace() as faster:
            gather(faster)
        assert columns.column("number").tolist() == list(range(700))
    assert not list(root.iterdir())


def test_workers_of_torchrun_find_everything_done_however_late_they_come(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with Workplace() as place:
        gather(place)
    monkeypatch.setenv("RANK", "1")
    calls: list[range] = []
    with Workplace() as place:
        gather(place, calls=calls)
    assert not calls and not list(root.iterdir())
    with pytest.raises(RuntimeError), Workplace() as place:  # the other one's results were not written
        gather(place)
        monkeypatch.setenv("RANK", "0")
        raise RuntimeError
    assert list(root.iterdir())


@pytest.mark.parametrize("damage", ["manifest gone", "no JSON", "deep JSON", "other entries", "another record"])
def test_a_damaged_folder_makes_way(root: Path, tmp_path: Path, damage: str) -> None:
    def spoil(folder: Path) -> None:
        manifest = folder / "manifest.json"
        content = json.loads(manifest.read_text())
        if damage == "manifest gone":
            manifest.unlink()
        elif damage == "another record":
            manifest.write_text(json.dumps(content | {"record": content["record"] | {"n": 701}}))
        elif damage == "other entries":
            manifest.write_text(json.dumps(content | {"parts": [{"file": "../x", "n": -1}]}))
        else:
            manifest.write_text("{" if damage == "no JSON" else "[" * 100_000)

    said: list[str] = []
    with pytest.raises(RuntimeError), Workplace() as place:
        gather(place)
        raise RuntimeError
    spoil(next(root.iterdir()))
    with Workplace(say=said.append) as place:
        assert gather(place).column("number").tolist() == list(range(700))
    assert "was damaged" in said[0] and not list(root.iterdir())
    with Workplace(tmp_path / "mine") as place:
        gather(place)
    spoil(next((tmp_path / "mine").iterdir()))
    with pytest.raises(UserError, match="is damaged"), Workplace(tmp_path / "mine") as place:
        gather(place)


def test_a_flipped_bit_is_found_and_its_images_measured_again(tmp_path: Path) -> None:
    with Workplace(tmp_path) as place:
        gather(place)
    (part,) = tmp_path.glob("*/part-000001.safetensors")
    data = bytearray(part.read_bytes())
    data[-5] ^= 4
    part.write_bytes(data)
    said: list[str] = []
    calls: list[range] = []
    with Workplace(tmp_path, say=said.append) as place:
        assert gather(place, calls=calls).column("number").tolist() == list(range(700))
    assert (
        calls[0].start == 300
        and len(calls) == 6
        and str(part) in said[0]
        and "300 images are measured again" in said[0]
    )


def test_between_two_passes_it_stops_at_once(root: Path) -> None:
    stop = StopFlag()
    with pytest.raises(Stopped, match="run the same command again") as caught, Workplace(stop=stop) as place:
        gather(place)
        stop.received = signal.SIGTERM
        place.check_stop("fd of a student")
    assert caught.value.exit_code == 143 and "fd of a student" in caught.value.message and list(root.iterdir())
