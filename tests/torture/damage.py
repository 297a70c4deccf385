"""Damaged files, read: exit 2 with a message that names the file, or the result of the intact file; nothing else is
accepted.

Where no digest can tell (a picture of other pixels, a user's own YAML), another result is accepted, too.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.torture import forks
from tests.torture.compare import snapshot
from tests.torture.mutate import FORMATS, RAW
from tests.torture.specimens import SPECIMENS, Specimen, build, find_file

SECONDS = 20.0
MEMORY = 4 * 2**30  # bytes, above what is in use when the command starts
BEHIND_DIGESTS = ("json_node", "record", "tensor_header")


@dataclass(frozen=True)
class Mutant:
    specimen: str
    mutation: str
    seed: int

    @property
    def replay(self) -> str:
        return f"--replay '{json.dumps(asdict(self))}'"


class Intact:
    """The specimen, and what comes of reading it."""

    def __init__(self, specimen: Specimen, base: Path):
        self.specimen, self.folder = specimen, build(specimen, base)
        self.file = find_file(specimen, self.folder).relative_to(self.folder)
        self.data = (self.folder / self.file).read_bytes()
        outcome, self.products = self.read(base / "intact", base / "log")
        if outcome.code != 0:
            raise RuntimeError(f"{specimen.name}, intact: {outcome.brief}\n{outcome.text}")

    def read(
        self, folder: Path, log: Path, data: bytes | None = None, trust: bool = False
    ) -> tuple[forks.Outcome, dict[str, str]]:
        """Read it in a copy of its folder, with `data` in its place; the file itself is no product. `trust`: without
        looking at digests."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        if data is not None:
            (folder / self.file).write_bytes(data)
        read = self.specimen.read
        function: Callable[[], Any] = (
            forks.d2o(["--trust", *read] if trust else read) if isinstance(read, list) else read
        )
        outcome = forks.run(function, cwd=folder, log=log, seconds=SECONDS, memory=MEMORY)
        if outcome.code != 0:
            return outcome, {}
        products = snapshot(folder, self.specimen.unlike)
        products.pop(str(self.file), None)
        return outcome, products


def plan(specimens: list[Specimen], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, as many of each specimen; half of them of the mutations that know the format."""
    mutants = []
    for i, specimen in enumerate(specimens):
        share = count // len(specimens) + (i < count % len(specimens))
        rng = random.Random(f"{seed}/{specimen.name}")
        raw, known = list(RAW), list(FORMATS[specimen.format])
        for k in range(share):
            names = known if known and k % 2 else raw
            mutants.append(
                Mutant(
                    specimen.name,
                    names[(k // 2) % len(names)] if known else names[k % len(names)],
                    rng.randrange(2**31),
                )
            )
    random.Random(seed).shuffle(mutants)  # so that a run that is stopped has seen something of everything
    return mutants


def attempt(mutant: Mutant, intact: Intact, folder: Path, log: Path) -> dict[str, Any]:
    specimen, rng = intact.specimen, random.Random(mutant.seed)
    mutation, tells = (
        (RAW[mutant.mutation], True) if mutant.mutation in RAW else FORMATS[specimen.format][mutant.mutation]
    )
    data = mutation(intact.data, rng)
    result: dict[str, Any] = {"what": specimen.name, "kind": mutant.mutation, "failures": [], "replay": mutant.replay}
    if data is None or data == intact.data:
        return {**result, "code": -1, "peak": 0}
    # Behind a digest nobody would ever see whether values are checked: sometimes it is not looked at.
    trust = specimen.own and mutant.mutation in BEHIND_DIGESTS and rng.random() < 0.4
    outcome, products = intact.read(folder, log, data, trust)
    failures = _verdict(specimen, intact, outcome, products, own=specimen.own and tells and not trust)
    if trust:
        result["kind"] += " --trust"
    return {
        **result,
        "code": outcome.code if outcome.code is not None else -outcome.signal,
        "peak": outcome.peak,
        "seconds": outcome.seconds,
        "failures": failures,
    }


def mutants(
    intact: dict[str, Intact], planned: list[Mutant], base: Path, jobs: int, keep: bool
) -> Iterator[dict[str, Any]]:
    def work(number: int) -> dict[str, Any]:
        mutant, folder = planned[number], base / f"{number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        result = attempt(mutant, intact[mutant.specimen], folder / "place", folder / "log")
        if not keep or not result["failures"]:
            shutil.rmtree(folder, ignore_errors=True)
        return result

    return forks.share(jobs, len(planned), work, base)


def find(name: str) -> Specimen:
    return next(specimen for specimen in SPECIMENS if specimen.name == name)


def _verdict(
    specimen: Specimen, intact: Intact, outcome: forks.Outcome, products: dict[str, str], own: bool
) -> list[str]:
    said = [line.strip() for line in outcome.text.splitlines() if line.strip()]
    if outcome.timed_out:
        return ["hang: " + outcome.brief]
    if outcome.signal:
        return [f"signal {outcome.signal}", *said[-2:]]
    if outcome.code == 2 or (
        outcome.code == 1 and said and said[-1].startswith("would not start:")
    ):  # so `--plan` refuses
        text = outcome.text
        if "Traceback" in text:
            return ["traceback with exit 2", *said[-2:]]
        named = any(name in text for name in (*specimen.names, intact.file.name))
        if (
            not named and "not finite" not in text
        ):  # weights that are wrong, but as they were written, are said of the network
            return ["the message names no file", *said[-3:]]
        if max(len(line) for line in said) > 20_000:
            return [f"a message of {max(len(line) for line in said):,} characters", *(line[:200] for line in said[-3:])]
        return []
    if outcome.code != 0:
        return [f"exit {outcome.code}: {_kind(said)}", *(line[:300] for line in said[-3:])]
    if not own or products == intact.products:
        return []
    changed = [
        name
        for name in sorted(products.keys() | intact.products.keys())
        if products.get(name) != intact.products.get(name)
    ]
    return ["silent acceptance: another result", ", ".join(changed)[:300]]


def _kind(said: list[str]) -> str:
    """The exception in the last lines."""
    for line in reversed(said):
        text = line.removeprefix("error: ")
        name = text.partition(":")[0]
        if name.isidentifier() or name.replace(".", "").isidentifier():
            return text[:120]
    return said[-1][:120] if said else "no message"
