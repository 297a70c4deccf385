"""Diffusion2GAN's tables in small, measured: the rows of recipes/tables/d2g_mini.yaml for several seeds of training.

    python tools/d2g_mini.py [--seeds 0,1,2] [--only WORD ...] [--set KEY=VALUE ...]

Trains what is not trained yet (`--resume`), measures what is not measured, in runs/d2g_mini; then writes
results/d2g_mini.json, and the table between the marks in docs/results.md. `--only`: rows whose recipe or name has such
a word in it. `--set`: of every training. The teacher's images, made once, stay in runs/d2g_mini/work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from d2o.reports.paper_tables import PaperRow, load_table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
RUNS, OUT = Path("runs/d2g_mini"), ROOT / "results" / "d2g_mini.json"
SHOWN = {"rel-fd": "rel-FD(digits)", "prompt-accuracy": "prompt accuracy", "diversity": "diversity"}


def place(run: str, seed: int) -> Path:
    """Where the run of a table's `x` or `start` lies for a seed."""
    return RUNS / f"seed{seed}" / Path(run).name


def training(row: PaperRow, seed: int, settings: list[str]) -> str:
    assert row.recipe is not None and row.x is not None
    verb, start = ("finetune", f" --from {place(row.start, seed)}") if row.start else ("train", "")
    more = "".join(f" --set {shlex.quote(text)}" for text in settings)
    return f"d2o {verb} {row.recipe}{start} --seed {seed} --out {place(row.x, seed)}{more} --resume"


def measuring(row: PaperRow, seed: int) -> tuple[str, Path]:
    """The command, and the result that it writes."""
    table = load_table("d2g_mini")
    options = {key: ",".join(v) if isinstance(v, list) else v for key, v in table.options_of(row).items()}
    given = "".join(f" --{key.replace('_', '-')} {value}" for key, value in options.items())
    x = row.x if row.recipe is None else place(str(row.x), seed)
    path = RUNS / f"seed{seed}" / f"{Path(str(row.x)).name}.json"
    return f"d2o eval {x}{given} --name {shlex.quote(row.name)} --work {RUNS / 'work'} --json {path}", path


def run(line: str) -> None:
    print(f"$ {line}", flush=True)
    subprocess.run([sys.executable, "-m", "d2o", *shlex.split(line)[1:]], check=True, cwd=ROOT)


def entry(row: PaperRow, seeds: list[int], settings: list[str]) -> dict[str, Any]:
    """A row, trained and measured for every seed."""
    commands, found = [], []
    for seed in seeds if row.recipe else seeds[:1]:
        lines = [training(row, seed, settings)] if row.recipe else []
        line, path = measuring(row, seed)
        for command in lines:
            run(command)
        if not (ROOT / path).exists():
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            run(line)
        commands += [*lines, line]
        found.append(json.loads((ROOT / path).read_text()))
    values = {key: [record["metrics"][key]["value"] for record in found if key in record["metrics"]] for key in SHOWN}
    return {
        "name": row.name,
        "recipe": row.recipe,
        "commands": commands,
        "metrics": {key: mean_of(runs) for key, runs in values.items() if runs},
        "protocol": found[-1]["protocol"],
        "env": found[-1]["env"],
    }


def mean_of(runs: list[float]) -> dict[str, Any]:
    std = statistics.stdev(runs) if len(runs) > 1 else None
    return {"value": statistics.fmean(runs), "std": std, "runs": runs}


def cell(row: dict[str, Any], key: str) -> str:
    if key not in row["metrics"]:
        return ""
    scale, digits, unit = (100, 1, " %") if key == "prompt-accuracy" else (1, 3, "")
    value, std = row["metrics"][key]["value"], row["metrics"][key]["std"]
    return f"{scale * value:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std is not None else "") + unit


def table(record: dict[str, Any]) -> str:
    lines = [["", *SHOWN.values()], ["---", *["---:"] * len(SHOWN)]]
    lines += [[row["name"], *(cell(row, key) for key in SHOWN)] for row in record["rows"]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[])
    options = parser.parse_args()
    seeds = [int(text) for text in options.seeds.split(",")]
    asked = [
        row
        for row in load_table("d2g_mini").rows
        if not options.only or any(word in f"{row.recipe} {row.name}" for word in options.only)
    ]
    before = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
    rows = {row["name"]: row for row in before} | {row.name: entry(row, seeds, options.set) for row in asked}
    order = [row.name for row in load_table("d2g_mini").rows]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    record = {
        "what": "Diffusion2GAN's tables in small: mean and deviation over seeds of training",
        "seeds": seeds,
        "rows": [rows[name] for name in order if name in rows],
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    page = ROOT / "docs" / "results.md"
    if "<!-- d2g_mini: generated" in page.read_text():
        from results import put

        put(page, "d2g_mini", table(record))


if __name__ == "__main__":
    main()
