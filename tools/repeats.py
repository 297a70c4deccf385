"""How much the measure itself deviates: results/repeats.json, and docs/results.md.

    python tools/repeats.py [--runs FOLDER ...]

Rows of mini_methods (of each the first seed that is in the folders of runs), measured three times as the table does,
each time on 50,000 images of other noises.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from table_results import Job, jobs, markdown

from d2o.reports.paper_tables import load_table
from results import made_by, put

ROOT = Path(__file__).resolve().parent.parent
TABLE, REPEATS = "mini_methods", 3
ROWS = ("ODE distillation, pseudo-Huber", "DMD2", "SiD")
METRICS = {"fd@digits": "FD(digits)", "rel-fd@digits": "rel-FD to the teacher"}


def first(row: str, folders: list[Path]) -> tuple[Job, Path]:
    """The row's training of the lowest seed that is here, and where."""
    for job in jobs(TABLE, load_table(TABLE)):
        for folder in folders:
            run = folder / Path(job.x).name
            if job.row.name == row and job.run is not None and (run / "checkpoints" / "last.safetensors").exists():
                return job, run
    sys.exit(f"no training of {row!r} in {', '.join(map(str, folders))}: python tools/table_results.py {TABLE}")


def measure(row: str, folders: list[Path]) -> dict[str, Any]:
    job, run = first(row, folders)
    line = f"{job.commands()[-1]} --repeats {REPEATS}"
    words = [str(run) if word == job.x else word for word in shlex.split(line)[1:]]
    print(f"$ {line}", flush=True)
    subprocess.run([sys.executable, "-m", "d2o", *words], check=True, cwd=ROOT)
    made = json.loads((ROOT / "runs" / "record.json").read_text())
    commands = [*job.commands()[:-1], line]
    return {"row": row, "seed": job.seed, "recipe": job.made_by(), "commands": commands, "eval": made}


def table(record: dict[str, Any]) -> str:
    lines = [["measured three times, one training", *METRICS.values()], ["---", *["---:"] * len(METRICS)]]
    for made in record["rows"]:
        found = made["eval"]["metrics"]
        cells = [f"{found[key]['value']:.3f} ± {found[key]['std']:.3f}" for key in METRICS]
        lines.append([made["row"], *cells])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[ROOT / "runs"])
    folders = parser.parse_args().runs
    what = "how much FD and rel-FD of 50,000 images deviate, one training measured on other noises"
    record = {"what": what, "rows": [measure(row, folders) for row in ROWS], **made_by()}
    (ROOT / "results" / "repeats.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    put(ROOT / "docs" / "results.md", "repeats", table(record))


if __name__ == "__main__":
    main()
