"""python -m tests.torture --kills 200 --mutations 5000 --seed 0 --jobs 2 [--only WORD] [--replay JSON]

Exit code 1 if any trial failed. A trial that failed prints the command that repeats it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1",
    NO_COLOR="1",
    COLUMNS="160",
    TERM="dumb",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    PYTHONDONTWRITEBYTECODE="1",
)

from tests.torture import commands, damage, forks, kill
from tests.torture.report import Report
from tests.torture.specimens import QUICK, SPECIMENS


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="kills at random moments, of all commands together")
    parser.add_argument(
        "--events",
        type=int,
        default=-1,
        help="kills at events of the last checkpoint, for each command; -1: all, and some others",
    )
    parser.add_argument("--full", type=int, default=6, help="full disks for each command")
    parser.add_argument("--mutations", type=int, default=5000, help="damaged files, of all formats together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="trials at once")
    parser.add_argument("--only", default="", help="only commands and formats whose name holds this")
    parser.add_argument("--quick", action="store_true", help="the short form: fewer commands and formats")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--keep", type=Path, help="work in this folder, and keep the trials that failed")
    parser.add_argument("--replay", help="repeat one trial, as its failure printed it")
    return parser.parse_args()


def main() -> int:
    asked, started = options(), time.perf_counter()
    base = asked.keep or Path(tempfile.mkdtemp(prefix="d2o-torture-"))
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    forks.warm(long=not asked.quick)
    report = Report()
    try:
        once = json.loads(asked.replay) if asked.replay else None
        if "command" in once if once else asked.kills or asked.events or asked.full:
            kills(asked, once, base, report)
        if "specimen" in once if once else asked.mutations:
            mutations(asked, once, base, report)
    finally:
        if asked.json:
            report.save(asked.json)
        if not asked.keep:
            shutil.rmtree(base, ignore_errors=True)
    print(
        f"\n{report.table()}\n\n{len(report.results)} trials, {len(report.failed)} failed,"
        f" {time.perf_counter() - started:.0f} s"
    )
    return 1 if report.failed else 0


def kills(asked: argparse.Namespace, once: dict | None, base: Path, report: Report) -> None:
    chosen = (
        [kill.find(once["command"])]
        if once
        else [c for c in commands.COMMANDS if asked.only in c.name and c.quick >= asked.quick]
    )
    if not chosen:
        return
    inputs = commands.prepare(base)
    references = {
        c.name: kill.Reference(c, inputs, _folder(base / "references" / c.name.replace(" ", "_"))) for c in chosen
    }
    planned = []
    for i, (name, reference) in enumerate(references.items()):
        if not asked.quick:
            report.add({"what": name, "kind": "undisturbed", "failures": reference.failures()})
        moments = asked.kills // len(chosen) + (i < asked.kills % len(chosen))
        planned += kill.plan(reference, moments, None if asked.events < 0 else asked.events, asked.full, asked.seed)
    random.Random(asked.seed).shuffle(planned)
    if once:
        planned = [kill.Trial(**once)]
    for result in kill.trials(references, planned, base / "kills", asked.jobs, keep=asked.keep is not None):
        report.add(result)


def mutations(asked: argparse.Namespace, once: dict | None, base: Path, report: Report) -> None:
    known = [s for s in SPECIMENS if asked.only in s.name and (not asked.quick or s.name in QUICK)]
    chosen = [damage.find(once["specimen"])] if once else known
    if not chosen:
        return
    intact = {
        s.name: damage.Intact(s, _folder(base / "specimens" / s.name.replace(" ", "_").replace("/", "_")))
        for s in chosen
    }
    planned = [damage.Mutant(**once)] if once else damage.plan(chosen, asked.mutations, asked.seed)
    for result in damage.mutants(intact, planned, base / "mutants", asked.jobs, keep=asked.keep is not None):
        report.add(result)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
