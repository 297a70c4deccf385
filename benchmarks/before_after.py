"""Speed of this checkout over that of another one: training, pairs, samples and SiD, by the commands themselves.

    python benchmarks/before_after.py --before DIR [--after DIR] [--only train,sid] [--rounds 7] [--clock cpu] [--quick]
                                      [--out FILE]

Each checkout has a process of its own, in which d2o is imported once. They run the same command one after the other,
never at once, and who begins alternates from round to round; the ratio after/before of each round is taken, and their
median is reported. Rates are images/s of the run's own log (train, sid) or of the whole command (pairs, sample). As the
commands are what both have, it does not matter how they are built inside. Target: 0.97.

`--clock cpu` counts the processor's seconds of the whole command on one thread instead: rounds agree within hundredths
where the machine is not ours alone and those of the wall clock deviate by a tenth.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 0.97
SHORT = ["--set", "eval=null", "--set", "preview=null", "--set", "checkpoint.keep=0", "--set", "log_every=5"]
KINDS = ("train", "pairs", "sample", "sid")
ITERATIONS, PAIRS, SAMPLES = 60, 1024, 16384
QUICK = 6  # times less
SPINS = "1000"


def command(what: str, folder: Path, part: int) -> tuple[list[str], int]:
    """The d2o command, which leaves `folder / "out..."`, and how many images it makes or trains on."""
    if what == "train":
        n = 128 * (ITERATIONS // part)
        given = [f"pairs.path={folder / 'store'}", "pairs.n=256", "pairs.solver=euler", "pairs.steps=2", f"images={n}"]
        sets = [word for text in given for word in ("--set", text)]
        return ["train", "quickstart", *SHORT, *sets, "--out", str(folder / "out")], n
    if what == "sid":
        n = 128 * (ITERATIONS // 2 // part)
        return ["train", "sid_digits", *SHORT, "--set", f"images={n}", "--out", str(folder / "out")], n
    if what == "pairs":
        return ["pairs", "--teacher", "digits", "--n", str(PAIRS // part), "--out", str(folder / "out")], PAIRS // part
    n = SAMPLES // part
    student = folder / "student" / "checkpoints" / "last.safetensors"
    return ["sample", str(student), "--n", str(n), "--out", str(folder / "out.zip")], n


def work() -> None:
    """One checkout's process: a command's arguments in, a line each; seconds and exit code out."""
    from d2o.cli.app import main

    answers = os.fdopen(os.dup(1), "w")
    import d2o

    about = {"at": str(Path(d2o.__file__).parent.parent), "version": d2o.__version__}
    print(json.dumps(about), file=answers, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what d2o prints
    for line in sys.stdin:
        code: Any = 0
        said = io.StringIO()
        start, cpu = time.perf_counter(), time.process_time()
        try:
            with contextlib.redirect_stdout(said):
                main(json.loads(line))
        except SystemExit as end:
            code = end.code
        seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print(json.dumps({"seconds": seconds, "code": code}), file=answers, flush=True)


class Checkout:
    """A checkout's process, and the folder that it works in."""

    def __init__(self, path: Path, folder: Path, clock: str):
        folder.mkdir()
        self.folder, self.clock = folder, clock
        environment = {**os.environ, "PYTHONPATH": str(path), "D2O_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        environment.setdefault("GOMP_SPINCOUNT", SPINS)  # else only the one that starts first waits by spinning
        if clock == "cpu":
            environment["OMP_NUM_THREADS"] = "1"
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            cwd=folder,
        )
        self.about = self.answer()
        assert Path(self.about["at"]) == path, f"{path}: d2o was imported from {self.about['at']}"

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.folder}: the process ended\n{(self.folder / 'log').read_text()[-3000:]}")
        return json.loads(line)

    def run(self, arguments: list[str]) -> float:
        """Seconds of a command."""
        assert self.process.stdin is not None
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        answer = self.answer()
        if answer["code"]:
            raise SystemExit(f"d2o {' '.join(arguments)}\n{(self.folder / 'log').read_text()[-3000:]}")
        return answer["seconds"][self.clock]

    def rate(self, what: str, part: int) -> float:
        """Images a second."""
        self.clear()
        arguments, n = command(what, self.folder, part)
        seconds = self.run(arguments)
        log = self.folder / "out" / "metrics.jsonl"
        if self.clock == "cpu" or not log.exists():
            return n / seconds
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return statistics.median(line["images_per_s"] for line in lines[1:] or lines)  # the first line warms up

    def clear(self) -> None:
        """Leave nothing to continue."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        (self.folder / "out.zip").unlink(missing_ok=True)

    def prepare(self) -> None:
        """The pairs and the student that the commands need, made by this checkout itself."""
        store, student = str(self.folder / "store"), str(self.folder / "student")
        self.run(["pairs", "--teacher", "digits", "--n", "256", "--solver", "euler", "--steps", "2", "--out", store])
        given = [f"pairs.path={store}", "pairs.n=256", "pairs.solver=euler", "pairs.steps=2", "images=128"]
        sets = [word for text in given for word in ("--set", text)]
        self.run(["train", "quickstart", *SHORT, *sets, "--out", student])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()


def compare(before: Checkout, after: Checkout, what: str, rounds: int, part: int) -> dict[str, Any]:
    rates: list[tuple[float, float]] = []
    for i in range(rounds + 1):
        order = (before, after) if i % 2 else (after, before)
        found = {checkout: checkout.rate(what, part) for checkout in order}
        if i:  # the first round warms up
            rates.append((found[before], found[after]))
            print(f"{what} {i}/{rounds}: {found[after] / found[before]:.3f}", file=sys.stderr, flush=True)
    ratios = sorted(now / was for was, now in rates)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "before_images_per_s": round(statistics.median(was for was, _ in rates), 1),
        "after_images_per_s": round(statistics.median(now for _, now in rates), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--after", type=Path, default=Path(__file__).resolve().parent.parent, help="default: this one")
    parser.add_argument("--only", default=",".join(KINDS), help="which of train, pairs, sample, sid")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="which seconds count")
    parser.add_argument("--quick", action="store_true", help="shorter commands, for a try")
    parser.add_argument("--out", type=Path, help="write the result to this file as well")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work()
    if options.before is None:
        parser.error("--before DIR is missing")
    part, kinds = QUICK if options.quick else 1, options.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory() as folder:
        before = Checkout(options.before.resolve(), Path(folder) / "before", options.clock)
        after = Checkout(options.after.resolve(), Path(folder) / "after", options.clock)
        for checkout in (before, after):
            checkout.prepare()
        results = {what: compare(before, after, what, options.rounds, part) for what in kinds}
        about = {"before": before.about, "after": after.about}
        for checkout in (before, after):
            checkout.close()
    from d2o.evaluation.protocol import hardware

    report = {
        "benchmark": "before_after",
        "what": "images/s of a command of one checkout over those of another's, alternating",
        "ratio": min(result["ratio"] for result in results.values()),
        "target": TARGET,
        "rounds": options.rounds,
        "clock": options.clock,
        "quick": options.quick,
        **results,
        **about,
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
