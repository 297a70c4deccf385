"""The runs of a table with seeds, trained and measured one after another: `python tools/table_results.py d2g_mini`.

Every row of every seed is one file results/TABLE/ROW_seedN.json: the commands that made it, the budget that was used,
and d2o's own record of the evaluation. Where that file is there and was made by the same recipe it is left out, so that
the same command goes on where it was stopped, on another machine too. Seeds come one after another, each with all rows.
`--rows TEXT`: rows whose name holds it, alone. `--again`: those that are measured, too. `--write`: measure nothing,
only write the table into docs/results.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2o.evaluation.protocol import option
from d2o.recipes.load import load_recipe
from d2o.reports.cells import number
from d2o.reports.paper_tables import PaperRow, PaperTable, RowRun, load_table
from d2o.reports.verdicts import verdicts
from results import budget, put, revision

ROOT = Path(__file__).resolve().parent.parent
DIGITS = [
    ("fd@digits", "FD(digits)", "{:.2f}", 1),
    ("rel-fd@digits", "rel-FD to the teacher", "{:.2f}", 1),
    ("accuracy", "accuracy, %", "{:.1f}", 100),
    ("recall@digits", "recall, %", "{:.1f}", 100),
    ("coverage@digits", "coverage, %", "{:.1f}", 100),
]
FINER = [(key, title, "{:.3f}", scale) for key, title, _, scale in DIGITS[:2]] + DIGITS[2:]
"""For methods that are near their teacher."""
COLUMNS = {
    "mini_methods": [
        *FINER,
        ("rmse", "rmse to the teacher", "{:.3f}", 1),
        ("nfe", "calls an image", "{}", 1),
    ],
    "mini_sida": FINER,
    "mini_spi_gan": [DIGITS[0], *DIGITS[3:]],
    "mini_d2g_pairs": [*FINER, ("rmse", "rmse to teacher", "{:.3f}", 1), ("NFE of all", "NFE of all", "{}", 1)],
    "d2g_mini": [
        ("rel-fd@digits-area", "rel-FD", "{:.3f}", 1),
        ("prompt-accuracy@digits-area", "prompt accuracy, %", "{:.1f}", 100),
        ("diversity@digits-area", "diversity", "{:.4f}", 1),
        ("rmse", "rmse to teacher", "{:.3f}", 1),
    ],
    "d2g_mini_lite0": [("rel-fd@lite0", "rel-FD(lite0)", "{:.2f}", 1)],
    "mini_gdd": [*DIGITS[:4], ("fd@lite0", "FD(lite0)", "{:.2f}", 1)],
    "cifar16": [
        ("fd@cifar16", "FD(cifar16)", "{:.2f}", 1),
        ("rel-fd@cifar16", "rel-FD to the teacher", "{:.2f}", 1),
        DIGITS[2],
        *[(f"{key}@cifar16", f"{key}, %", "{:.1f}", 100) for key in ("precision", "recall", "coverage")],
        ("fd@lite0", "FD(lite0)", "{:.1f}", 1),
        ("rel-fd@lite0", "rel-FD(lite0) to the teacher", "{:.1f}", 1),
        ("nfe", "calls an image", "{}", 1),
    ],
    "mini_gdd_fig2": [DIGITS[0], ("rel-fd@digits", "rel-FD to the one-step student", "{:.2f}", 1), *DIGITS[2:4]],
}


@dataclass(frozen=True)
class Job:
    """A row's run, or what the row measures without training."""

    table: str
    row: PaperRow
    run: RowRun | None
    options: dict[str, Any]
    against: str | None = None

    @property
    def x(self) -> str:
        return self.run.folder if self.run is not None else str(self.row.x)

    @property
    def record(self) -> Path:
        """Several rows may measure one run: it is called after the row."""
        name = re.sub(r"[^a-z0-9]+", "_", self.row.name.lower()).strip("_")
        return ROOT / "results" / self.table / f"{name}{'' if self.seed is None else f'_seed{self.seed}'}.json"

    @property
    def seed(self) -> int | None:
        """Of training. None: nothing is trained, or once for all seeds of the table."""
        return None if self.run is None else self.run.seed

    @property
    def changes(self) -> list[str]:
        return [*self.row.changes, *([] if self.seed is None else [f"seed={self.seed}"])]

    def made_by(self) -> dict[str, Any] | None:
        """The recipe with all its settings, and under "start" that of the run it begins from."""
        if self.run is None or self.row.recipe is None:
            return None
        made = load_recipe(self.row.recipe, self.changes).resolved()
        started = [job for job in jobs(self.table, load_table(self.table)) if job.x == self.run.start]
        return {**made, "start": started[0].made_by()} if started else made

    def commands(self) -> list[str]:
        lines = []
        if self.run is not None:
            verb = (
                f"finetune {self.row.recipe} --from {self.run.start}" if self.run.start else f"train {self.row.recipe}"
            )
            changes = [f"--set {shlex.quote(change)}" for change in self.changes]
            lines.append(f"d2o {verb} {' '.join(changes)} --out {self.run.folder} --resume")
        words = [] if self.against is None else ["--against", self.against]
        for key, value in self.options.items():
            words += [option(key), ",".join(value) if isinstance(value, list) else f"{value}"]
        name = shlex.quote(self.row.name)
        return [*lines, f"d2o eval {self.x} {shlex.join(words)} --name {name} --work runs/work --json runs/record.json"]


def jobs(name: str, table: PaperTable) -> Iterator[Job]:
    """What needs no training first, then what is trained once, then seed after seed, what others begin from first."""
    for row in table.rows:
        if row.x is not None and row.recipe is None:
            yield Job(name, row, None, table.options_of(row), table.against_of(row))
    for seed in (None, *table.seeds):
        for row in table.rows:
            for run in table.runs_of(row):
                if run.seed == seed:
                    options = table.options_of(row)
                    if "teacher" in options:
                        options["teacher"] = table.teacher_of(row, seed=seed)
                    yield Job(name, row, run, options, table.against_of(row))


def current(job: Job) -> dict[str, Any] | None:
    """The job's record, if it is there and was made as the job is made now."""
    if not job.record.exists():
        return None
    record = json.loads(job.record.read_text())
    made = [asked(line) for line in record["commands"]] == [asked(line) for line in job.commands()]
    return record if made and same(record["recipe"], job.made_by()) else None


def asked(line: str) -> str:
    """A command without what a table came to ask for later: density and coverage beside precision and recall. What was
    measured before has no such numbers."""
    return re.sub(r"\bprdc@", "pr@", line)


def same(recorded: Any, now: Any) -> bool:
    """Whether all settings of a recorded recipe are still these. Its words, and keys that came later, change nothing
    of how a run is made."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        return all(key in now and same(recorded[key], now[key]) for key in recorded if key not in ("name", "title"))
    return bool(recorded == now)


def measure(job: Job) -> None:
    made_by = job.made_by()
    commit = revision()
    needed = [job.options.get("teacher"), *([] if job.run is None else [job.run.start])]
    for first in jobs(job.table, load_table(job.table)):
        named = first.x in needed or json.dumps(first.x) in json.dumps(made_by)  # as a critic to begin with is
        if first.run and named and first.x != job.x and not (ROOT / first.x).exists():
            run(first.commands()[0])  # measured elsewhere, but its weights are needed here
    for line in job.commands():
        run(line)
    made = json.loads((ROOT / "runs" / "record.json").read_text())
    made.pop("grid", None)
    record = {
        "row": job.row.name,
        "seed": job.seed,
        "recipe": made_by,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "commands": job.commands(),
        "training": None if job.run is None else budget(ROOT / job.run.folder),
        "eval": made,
    }
    job.record.parent.mkdir(parents=True, exist_ok=True)
    part = job.record.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    os.replace(part, job.record)


def run(line: str) -> None:
    print(f"$ {line}", flush=True)
    subprocess.run([sys.executable, "-m", "d2o", *shlex.split(line)[1:]], check=True, cwd=ROOT)


def measured(name: str, table: PaperTable) -> dict[str, dict[int | None, dict[str, Any]]]:
    """Row -> seed of training (None: it is not trained) -> its record, of all that is measured and current."""
    found: dict[str, dict[int | None, dict[str, Any]]] = {row.name: {} for row in table.rows}
    for job in jobs(name, table):
        if (record := current(job)) is not None:
            found[job.row.name][record["seed"]] = record
    return found


def write(name: str, table: PaperTable) -> None:
    """The table of all that is measured into docs/results.md, and what it says of the papers' orders into
    docs/orders.md."""
    rows = measured(name, table)
    text = shown(name, rows)
    if missing := [row for row, found in rows.items() if not found]:
        text += "\n\nNot measured yet: " + "; ".join(missing) + "."
    put(ROOT / "docs" / "results.md", name, text)
    put(ROOT / "docs" / "orders.md", name, orders(table, rows))


def shown(name: str, rows: dict[str, dict[int | None, dict[str, Any]]], without: Collection[str] = ()) -> str:
    """The measured ones of these rows of a table: mean and deviation over the seeds of training, but for the columns
    `without`. Minutes are not those of the trainings, which ran beside other work, but images over the rate that
    benchmarks/method_rates.py measured."""
    rates, table = rates_of(name), {row.name: row for row in load_table(name).rows}
    columns = [column for column in COLUMNS[name] if column[0] not in without]
    evals = {row: [record["eval"] for record in found.values()] for row, found in rows.items() if found}
    cells = {
        row: [table[row].about.get(column[0]) or cell(each, *column) for column in columns]
        for row, each in evals.items()
    }
    kept = [i for i in range(len(columns)) if not cells or any(made[i] for made in cells.values())]
    head = ["", "seeds", *(columns[i][1] for i in kept), "images trained", *(["minutes"] if rates else [])]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row, made in cells.items():
        parts = trainings(next(iter(rows[row].values())), row, table)
        line = [row, str(len(evals[row])) if parts else "", *(made[i] for i in kept)]
        line.append(" + ".join(f"{images:,}" for _, images in parts))
        if rates:
            known = all(first in rates for first, _ in parts)  # a row may be younger than the rates
            line.append(" + ".join(f"{images / rates[first] / 60:.1f}" for first, images in parts) if known else "")
        lines.append(line)
    return markdown(lines)


def trainings(record: dict[str, Any], row: str, table: dict[str, PaperRow]) -> list[tuple[str, int]]:
    """What was trained for a row, by names of rows, with images: the run that it begins from first."""
    if not record["training"]:
        return []
    own = [(row, record["training"]["images"])]
    if "start" not in record["recipe"]:
        return own
    first = next(name for name, other in table.items() if other.x == table[row].start)
    return [(first, record["recipe"]["start"]["images"]), *own]


def rates_of(name: str) -> dict[str, float]:
    """Images a second of the table's rows on two cores without other work; {} where they were not measured."""
    path = Path(__file__).parent.parent / "benchmarks" / "results" / f"method_rates_{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    return {row: made["images_per_s"] for row, made in record["rows"].items()}


def orders(table: PaperTable, rows: dict[str, dict[int | None, dict[str, Any]]]) -> str:
    """What the papers say of pairs of the table's rows, with the numbers that say whether it is seen here."""
    evals = {name: {seed: record["eval"] for seed, record in found.items()} for name, found in rows.items()}
    lines = [["claim", "by", "the better", "the other", "gain", "seeds that agree", "here"]]
    lines.append(["---", "---", "---:", "---:", "---:", "---:", "---"])
    for verdict in verdicts(table.orders, evals):
        numbers = [verdict.first, verdict.second, verdict.gain]
        cells = ["" if value is None else number(value) for value in numbers]
        cells[2] += "" if verdict.error is None else f" ± {number(verdict.error)}"
        agree = f"{verdict.agree} of {verdict.seeds}" if verdict.seeds else ""
        lines.append([verdict.order.claim, verdict.order.by, *cells, agree, verdict.word])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(evals: list[dict[str, Any]], key: str, _: str, shape: str, scale: float) -> str:
    """The mean of a number over trainings, and their deviation; a lone one's over its repetitions. What some of them
    have not been measured by is the mean of the others."""
    if key == "nfe":
        return shape.format(evals[0]["x"].get("nfe") or "")
    found = [metric for record in evals if (metric := number_of(record["metrics"], key)) is not None]
    if not found:
        return ""
    values = [metric["value"] for metric in found]
    std = statistics.stdev(values) if len(values) > 1 else found[0].get("std")
    spread = f" ± {shape.format(scale * std)}" if std is not None else ""
    return shape.format(scale * statistics.fmean(values)) + spread


def number_of(metrics: dict[str, Any], key: str) -> dict[str, Any] | None:
    if key == "rmse":
        value = (metrics.get("distance") or {}).get("rmse")
        return None if value is None else {"value": value}
    return metrics.get(key) or metrics.get(key.partition("@")[0])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("table", choices=[*COLUMNS])
    arguments.add_argument("--rows", default="")
    arguments.add_argument("--seeds", default="")
    arguments.add_argument("--again", action="store_true")
    arguments.add_argument("--write", action="store_true")
    given = arguments.parse_args()
    table = load_table(given.table)
    seeds = {int(seed) for seed in given.seeds.split(",") if seed}
    for job in [] if given.write else jobs(given.table, table):
        wanted = given.rows in job.row.name and (not seeds or job.seed is None or job.seed in seeds)
        if wanted and (current(job) is None or given.again):
            measure(job)
    write(given.table, table)


if __name__ == "__main__":
    main()
