"""Passes: shared by processes, continued after kills, the same to the last bit; and what is asked of every image."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from d2o.errors import UserError
from d2o.evaluation.collect import ImageBatch, Pass, check_images, collect
from d2o.runtime import StopFlag, Stopped
from tests.helpers import tiny_student
from tests.samples import make_extractor
from tests.workers import finish, start


class Brightness:
    identity = {"probe": "brightness"}

    def __call__(self, batch: ImageBatch) -> dict[str, torch.Tensor]:
        return {"brightness": batch.images.float().mean((1, 2, 3)), "number": batch.labels}


def numbered(
    n: int = 700,
    batch: int = 50,
    calls: list[range] | None = None,
    stop_after: int = 10**9,
    stop: StopFlag | None = None,
) -> Pass:
    """Image i is grey of value i mod 256."""

    def make(numbers: range) -> ImageBatch:
        if calls is not None:
            calls.append(numbers)
            if len(calls) >= stop_after and stop is not None:
                stop.received = signal.SIGINT
        index = torch.tensor(numbers)
        return ImageBatch((index % 256).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2), index, seconds=0.5)

    return Pass("numbers", n, batch, make, [Brightness()], {"what": "numbers"})


def test_memory_and_folder_hold_the_same(tmp_path: Path) -> None:
    inside, outside = collect(numbered()), collect(numbered(), tmp_path)
    for columns in (inside, outside):
        assert columns.n == 700 and columns.column("number").tolist() == list(range(700))
        assert columns.mean("brightness") == pytest.approx(sum(i % 256 for i in range(700)) / 700)
        assert columns.seconds == [0.5] * 14 and sorted(columns.names()) == ["brightness", "number"]
    with pytest.raises(KeyError):
        inside.column("absent")
    assert len(list(outside.blocks("number"))) == 3  # chunks of 300: whole batches, at least 256 images


def test_a_stopped_pass_goes_on_where_it_stopped(tmp_path: Path) -> None:
    stop, calls = StopFlag(), []
    with pytest.raises(Stopped, match=r"300 of 700 images of numbers; run the same command again"):
        collect(numbered(calls=calls, stop_after=8, stop=stop), tmp_path, stop=stop)
    again: list[range] = []
    progress: list[int] = []
    columns = collect(numbered(calls=again), tmp_path, progress.append)
    assert again[0].start == 300 and sum(map(len, again)) == 400 and sum(progress) == 700
    assert columns.column("number").tolist() == list(range(700))
    finished: list[range] = []
    assert collect(numbered(calls=finished), tmp_path).column("number").tolist() == list(range(700)) and not finished


def test_another_question_is_another_pass(tmp_path: Path) -> None:
    one, other = numbered(), numbered(n=650)
    assert one.fingerprint != other.fingerprint
    collect(one, tmp_path)
    collect(other, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_last_batch_counts_and_is_not_timed() -> None:
    columns = collect(numbered(n=130, batch=50))
    assert columns.column("number").tolist() == list(range(130)) and columns.seconds == [0.5, 0.5]


def test_images_that_are_not_finite_are_counted_and_named() -> None:
    images = torch.zeros(4, 1, 2, 2)
    images[2] = float("inf")
    with pytest.raises(UserError, match=r"the student: 1 of 4 images \(seeds 10 to 13\)"):
        check_images(images, range(10, 14), "the student")


def metrics(path: Path) -> dict[str, float]:
    return {key: entry["value"] for key, entry in json.loads(path.read_text())["metrics"].items() if "value" in entry}


def test_killed_evaluations_end_with_the_same_numbers_as_one_that_was_not(tmp_path: Path) -> None:
    tiny_student(tmp_path / "student.safetensors")
    make_extractor(tmp_path / "net.safetensors")
    home, logs = tmp_path / "home", [tmp_path / f"log{rank}" for rank in (0, 1)]
    words = "--against real:digits/a --metrics fd,kid --kid-size 500 --n 1500 --batch 50 --seed 5"
    words += " --no-teacher-distance --device cpu"
    command = ["eval", tmp_path / "student.safetensors", "--extractor", tmp_path / "net.safetensors", *words.split()]

    def begin(results: str, log: Path, **more: Any):
        return start([*command, "--json", tmp_path / results], log, D2O_HOME=str(home), **more)

    assert finish(begin("whole.json", logs[0])) == 0
    for done in (1, 2):  # killed when another chunk is there, and the manifest knows of all but the last
        assert finish(begin("parts.json", logs[0], die_in="record", die_at=2)) == -signal.SIGKILL
        assert len(list((home / "eval").glob("*/part-*.safetensors"))) == done + 1
    workers = [begin("parts.json", log, RANK=str(rank), WORLD_SIZE="2") for rank, log in enumerate(logs)]
    assert [finish(worker) for worker in workers] == [0, 0]
    assert "FD(" in logs[0].read_text() and "FD(" not in logs[1].read_text()
    assert metrics(tmp_path / "parts.json") == metrics(tmp_path / "whole.json")
    assert not list((home / "eval").iterdir())
