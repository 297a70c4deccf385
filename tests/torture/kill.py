"""Kills, stops and full disks: every trial must end, when the command is run again, with the bytes of a run that
nothing happened to."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.torture import forks
from tests.torture.commands import COMMANDS, Command, copy
from tests.torture.compare import differences, leftovers, snapshot
from tests.torture.events import FILLING, Events

LIMIT = 120.0  # seconds of one command: many times what it takes


@dataclass(frozen=True)
class Trial:
    """`kind`: moment (SIGKILL after a part of the reference's time), stop (SIGTERM likewise), event (SIGKILL at event
    number `at`), full (no space from event `at` on). `twice`: the continued command is killed, too, at an event of its
    own."""

    command: str
    kind: str
    at: float
    seed: int
    twice: bool = False

    @property
    def replay(self) -> str:
        return f"--replay '{json.dumps(asdict(self))}'"


class Reference:
    """The command run to its end, undisturbed: its events, its time, its products."""

    def __init__(self, command: Command, inputs: Path, base: Path):
        self.command, self.inputs, self.base = command, inputs, base
        folder = base / "reference"
        copy(inputs, command.inputs, folder)
        outcome, self.events = _watched(command.arguments, folder, base)
        if outcome.code != 0:
            raise RuntimeError(f"{command.name}, undisturbed: {outcome.brief}\n{outcome.text}")
        self.seconds = outcome.seconds
        self.products = snapshot(folder, command.inputs)

    def failures(self) -> list[str]:
        """What even an undisturbed command leaves behind; and whether a second one ends with other bytes."""
        folder = self.base / "second"
        copy(self.inputs, self.command.inputs, folder)
        forks.run(forks.d2o(self.command.arguments), cwd=folder, log=self.base / "log", seconds=LIMIT)
        return [f"left over: {name}" for name in leftovers(self.products)] + differences(
            self.products, snapshot(folder, self.command.inputs)
        )

    def tail(self) -> list[int]:
        """The events of the last checkpoint (or part) and of the end, by number."""
        ends = [
            i
            for i, (kind, path) in enumerate(self.events, 1)
            if kind == "os.rename" and path.endswith(self.command.marker)
        ]
        first = ends[-2] if len(ends) > 1 else 0
        return [i for i in self.telling() if i > first]

    def telling(self) -> list[int]:
        return [i for i, (_, path) in enumerate(self.events, 1) if not path.endswith(".lock")]


def plan(reference: Reference, moments: int, events: int | None, full: int, seed: int) -> list[Trial]:
    """`moments` random ones (one in five a polite stop); `events` of the last checkpoint's (None: all, and a sixth of
    the others); `full` disks."""
    name = reference.command.name
    rng = random.Random(f"{seed}/{name}")
    trials = [
        Trial(
            name, "stop" if i % 5 == 4 else "moment", round(rng.uniform(0.02, 1.0), 3), rng.randrange(2**31), i % 3 == 2
        )
        for i in range(moments)
    ]
    tail = reference.tail()
    others = [i for i in reference.telling() if i not in set(tail)]
    chosen = (
        tail + rng.sample(others, len(others) // 6)
        if events is None
        else sorted(rng.sample(tail, min(events, len(tail))))
    )
    trials += [Trial(name, "event", i, rng.randrange(2**31), rng.random() < 0.25) for i in chosen]
    filling = [i for i in reference.telling() if reference.events[i - 1][0] in FILLING]
    return trials + [
        Trial(name, "full", i, rng.randrange(2**31)) for i in sorted(rng.sample(filling, min(full, len(filling))))
    ]


def attempt(trial: Trial, reference: Reference, folder: Path, log: Path) -> dict[str, Any]:
    """One trial: {command, kind, at, kills, failures: [...], replay}."""
    command, rng = reference.command, random.Random(trial.seed)
    copy(reference.inputs, command.inputs, folder)
    kills, failures, where = 0, [], ""

    def disturbed(arguments: list[str], kind: str, at: float) -> forks.Outcome:
        if kind in ("moment", "stop"):
            after = at * reference.seconds
            return forks.run(
                forks.d2o(arguments), cwd=folder, log=log, seconds=LIMIT, kill_after=after, polite=kind == "stop"
            )
        return _watched(arguments, folder, log.parent, int(at), "full" if kind == "full" else "kill", log)[0]

    outcome = disturbed(command.arguments, trial.kind, trial.at)
    if trial.kind in ("event", "full") and trial.at <= len(reference.events):
        where = " ".join(reference.events[int(trial.at) - 1])
    kills += outcome.signal != 0
    failures += _verdict(trial.kind, outcome)
    again = [*command.arguments, *command.again]
    if trial.twice and outcome.code != 0:
        second = disturbed(again, "event", rng.randrange(1, len(reference.events) + 1))
        kills += second.signal != 0
    outcome = forks.run(forks.d2o(again), cwd=folder, log=log, seconds=LIMIT)
    if outcome.code != 0:
        failures.append(f"the same command again: {outcome.brief}: {_said(outcome.text)}")
    failures += differences(reference.products, snapshot(folder, command.inputs))
    return {
        "what": trial.command,
        "kind": trial.kind,
        "at": trial.at,
        "where": where,
        "kills": kills,
        "failures": failures,
        "replay": trial.replay,
    }


def trials(
    references: dict[str, Reference], planned: list[Trial], base: Path, jobs: int, keep: bool
) -> Iterator[dict[str, Any]]:
    def work(number: int) -> dict[str, Any]:
        trial = planned[number]
        folder = base / f"{number:05d}" / "place"
        folder.parent.mkdir(parents=True, exist_ok=True)
        result = attempt(trial, references[trial.command], folder, folder.parent / "log")
        if not keep or not result["failures"]:
            shutil.rmtree(folder.parent, ignore_errors=True)
        return result

    return forks.share(jobs, len(planned), work, base)


def find(name: str) -> Command:
    return next(command for command in COMMANDS if command.name == name)


def _verdict(kind: str, outcome: forks.Outcome) -> list[str]:
    """What is wrong with how the disturbed command itself ended."""
    if outcome.timed_out:
        return [f"{kind}: {outcome.brief}"]
    if kind == "full" and outcome.code not in (0, 2):
        return [f"full disk: {outcome.brief}: {_said(outcome.text)}"]
    if kind == "full" and (outcome.text.count("error:") > 1 or "Traceback" in outcome.text):
        return [f"full disk: not one clear line: {_said(outcome.text)}"]
    if kind == "stop" and outcome.code not in (0, 143) and outcome.signal != 15:
        return [f"SIGTERM: {outcome.brief}: {_said(outcome.text)}"]
    return []


def _said(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
    return " / ".join(lines[errors[-1] :] if errors else lines[-3:])[:300]


def _watched(
    arguments: list[str], folder: Path, base: Path, at: int = 0, action: str = "kill", log: Path | None = None
) -> tuple[forks.Outcome, list[tuple[str, str]]]:
    """Run with its events counted, and with `action` at number `at`; the events of a run that lived."""
    command: Callable[[], None] = forks.d2o(arguments)
    listed = base / "events.json"
    listed.unlink(missing_ok=True)

    def watched() -> None:
        events = Events(folder, at, action)
        events.install()
        try:
            command()
        finally:
            events.save(listed)

    outcome = forks.run(watched, cwd=folder, log=log or base / "log", seconds=LIMIT)
    return outcome, [tuple(event) for event in json.loads(listed.read_text())] if listed.exists() else []
