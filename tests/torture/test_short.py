"""The short form of the torture: some kills at events of the last checkpoint, some full disks, some damaged files. The
long one is `make torture`. A failure prints the command that repeats it alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests import workers
from tests.torture import forks
from tests.torture.commands import COMMANDS
from tests.torture.compare import LEFTOVER, differences, snapshot
from tests.torture.events import Events
from tests.torture.mutate import FORMATS, RAW
from tests.torture.specimens import QUICK

KINDS = [command.name for command in COMMANDS if command.quick]
AMOUNT = ["--quick", "--kills", "5", "--events", "2", "--full", "1", "--mutations", "90", "--jobs", "1"]


def _torture(log: str, arguments: list[str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.argv[1:] = arguments
    from tests.torture.__main__ import main

    sys.exit(main())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """All trials, made by a process of its own: this one has threads, and could not fork. The server of processes has
    imported torch."""
    folder = tmp_path_factory.mktemp("torture")
    path, log = folder / "results.json", folder / "log"
    process = workers.CONTEXT.Process(target=_torture, args=(str(log), [*AMOUNT, "--json", str(path)]))
    process.start()
    code = workers.finish(process, 800)
    assert path.exists(), log.read_text()
    found = json.loads(path.read_text())
    assert code == (1 if found["failed"] else 0), log.read_text()
    return found["results"]


def failed(results: list[dict]) -> str:
    lines = [
        f"{r['what']}, {r['kind']} {r.get('where', '')}: {'; '.join(r['failures'])[:600]}\n    python -m tests.torture"
        f" {r['replay']}"
        for r in results
        if r["failures"]
    ]
    return "\n".join(lines)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", KINDS)
def test_killed_commands_end_with_the_same_bytes(results, name):
    mine = [result for result in results if result["what"] == name]
    assert len(mine) == 4 and sum(result["kills"] for result in mine) >= 2
    assert not failed(mine), failed(mine)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", QUICK)
def test_damaged_files_are_named_or_do_no_harm(results, name):
    mine = [result for result in results if result["what"] == name]
    assert len(mine) >= 6
    assert not failed(mine), failed(mine)


# The harness itself


def test_a_process_dies_in_the_middle_of_a_write_and_at_every_other_event(tmp_path):
    def careless() -> None:
        Events(place, at, "kill").install()
        Path("a.txt").write_text("0123456789")
        os.rename("a.txt", "b.txt")

    left = []
    for at in range(1, 5):
        place = tmp_path / str(at)
        place.mkdir()
        outcome = forks.run(careless, cwd=place, log=tmp_path / "log", seconds=20)
        left.append((outcome.signal, {path.name: path.read_text() for path in place.iterdir()}))
    assert left == [(9, {}), (9, {"a.txt": "01234"}), (9, {"a.txt": "0123456789"}), (0, {"b.txt": "0123456789"})]


def test_a_full_disk_stays_full(tmp_path):
    def writer() -> None:
        Events(tmp_path / "place", 4, "full").install()
        for name in "abc":
            try:
                Path(name).write_text("0123456789")
            except OSError as error:
                print(f"{name}: {error.strerror}")

    (tmp_path / "place").mkdir()
    outcome = forks.run(writer, cwd=tmp_path / "place", log=tmp_path / "log", seconds=20)
    assert (
        outcome.code == 0
        and "b: No space left on device" in outcome.text
        and "c: No space left on device" in outcome.text
    )
    assert (tmp_path / "place" / "a").read_text() == "0123456789" and (tmp_path / "place" / "b").read_text() == "01234"


def test_what_is_left_over_or_differs_is_seen(tmp_path):
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text('{"loss": 1.0, "images_per_s": 3}\n')
    before = snapshot(tmp_path)
    log.write_text('{"loss": 1.0, "images_per_s": 4}\n')
    assert snapshot(tmp_path) == before
    log.write_text('{"loss": 2.0, "images_per_s": 4}\n')
    (tmp_path / "run" / ".x.tmp").touch()
    found = differences(before, snapshot(tmp_path))
    assert found[0].startswith("differs: run/metrics.jsonl (part 0") and found[1] == "left over: run/.x.tmp"
    assert LEFTOVER.search("run/.last.safetensors.abc.tmp") and not LEFTOVER.search("run/checkpoints/last.safetensors")


def test_mutations_repeat(tmp_path):
    import random

    text = b'{"a": [1, 2, {"b": 3.5}], "name": "x"}' * 3
    for name, mutation in RAW.items():
        first, second = (mutation(text, random.Random(7)) for _ in range(2))
        assert first == second, name
    assert all(names for kind, names in FORMATS.items() if kind)
