"""How many images a second each row of a small table trains on this machine, alone on all its cores, and over the first
row that is trained.

    python benchmarks/method_rates.py [TABLE] [--seconds 20] [--out FILE.json]

From the log of `d2o train` itself, which leaves evaluation and the making of pairs out; the beginning is left out too.
Pairs lie in runs/pairs, as in training. docs/results.md has the minutes of a row from here: its own trainings ran
beside others.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from d2o.evaluation.protocol import hardware
from d2o.recipes.load import load_recipe
from d2o.reports.paper_tables import PaperRow, PaperTable, load_table

RESULTS = Path(__file__).parent / "results"
WARM, LOGGED = 3, "log_every=1"
"""Lines of the log, an iteration each, that are not counted."""


def command(table: PaperTable, row: PaperRow, folder: Path, *more: str) -> list[str]:
    """`d2o train`, or `d2o finetune` from the run that the row begins from, which is then trained for one batch."""
    out, words = folder / str(row.x), [str(row.recipe)]
    if row.start:
        first = next(other for other in table.rows if other.x == row.start)
        subprocess.run(command(table, first, folder, "--set", "images=128"), check=True)
        words += ["--from", str(folder / str(first.x))]
    given = [*row.changes, "eval=null", "preview=null"]
    recipe = load_recipe(str(row.recipe))
    if recipe.method == "sid" and recipe.options.adversarial:
        given += ["sid.start_g_nimg=0", "sid.start_adv_nimg=0"]  # what comes before is short, and cheaper
    changes = [word for change in given for word in ("--set", change)]
    verb = "finetune" if row.start else "train"
    return [sys.executable, "-m", "d2o", verb, *words, *changes, *more, "--out", str(out)]


def rate(table: PaperTable, row: PaperRow, seconds: float) -> float:
    """Images/s over at least that many seconds of training: the mean, as some terms come only now and then."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(table, row, Path(folder), "--set", LOGGED, "--set", f"images={10**8}")
        print(f"$ d2o {shlex.join(words[3:])}", flush=True)
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        log, images, spent = Path(folder) / str(row.x) / "metrics.jsonl", 0, 0.0
        while spent < seconds and process.poll() is None:
            time.sleep(0.5)
            images, spent = counted(log)
        if process.poll() is not None:
            raise SystemExit(f"{row.name}: training ended after {spent:.1f} s, exit status {process.returncode}")
        process.send_signal(signal.SIGINT)
        process.wait()
    return images / spent


def counted(log: Path) -> tuple[int, float]:
    """Images and seconds of a log, without its first lines."""
    text = log.read_text() if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # the last line may be half written
    steps = [line for line in map(json.loads, whole.splitlines()) if "images_per_s" in line][WARM - 1 :]
    parts = [(b["images"] - a["images"], b["images_per_s"]) for a, b in itertools.pairwise(steps)]
    return sum(n for n, _ in parts), sum(n / speed for n, speed in parts)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("table", nargs="?", default="mini_methods")
    arguments.add_argument("--seconds", type=float, default=20.0)
    arguments.add_argument("--out", default="")
    given = arguments.parse_args()
    table, rates = load_table(given.table), {}
    made: dict[str, Any] = {}
    for row in table.rows:
        if row.recipe is None:
            continue
        if str(row.x) not in made:
            made[str(row.x)] = rate(table, row, given.seconds)
        rates[row.name] = made[str(row.x)]
        print(f"{row.name}: {rates[row.name]:.1f} images/s", flush=True)
    baseline = next(iter(rates))
    record = {
        "table": given.table,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "seconds": given.seconds,
        "baseline": baseline,
        "rows": {name: {"images_per_s": speed, "ratio": speed / rates[baseline]} for name, speed in rates.items()},
    }
    out = Path(given.out) if given.out else RESULTS / f"method_rates_{given.table}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
