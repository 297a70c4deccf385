"""How active the layers of small teachers are over the noise levels of sampling (GDD, Fig. 3):
results/activations.json, the pictures in docs/ and the table of docs/results.md.

    python tools/activations.py [--runs runs/activations]

Measures what is not measured yet; trains the second teacher (NCSN++, the paper's architecture, on digits) if it is not
there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from d2o.evaluation.results import compact_json
from results import made_by

ROOT = Path(__file__).resolve().parent.parent
STATS = ("mean_abs", "rms", "mean")
CHANGES = ["network.arch=ncsnpp", "eval=null", "threads=1"]
TRAIN = f"d2o train teacher_digits --mini {' '.join(f'--set {change}' for change in CHANGES)}"
TEACHERS = {"digits": "digits", "digits_ncsnpp": "{runs}/teacher_ncsnpp"}
"""Name -> X. The first ships; the second is trained by `TRAIN`."""

MAXIMA = 5
"""How many of a layer's maxima are kept, behind their number."""


def run(line: str) -> None:
    print(f"$ {line}", flush=True)
    subprocess.run([sys.executable, "-m", "d2o", *shlex.split(line)[1:]], check=True, cwd=ROOT)


def commands(runs: str) -> list[str]:
    """What makes the results, as a reader would type it; the lines that a name and a statistic stand for."""
    lines = [f"{TRAIN} --out {runs}/teacher_ncsnpp --resume"]
    for name, x in TEACHERS.items():
        for stat in STATS:
            n = 64 if stat == "mean_abs" else 32
            line = f"d2o eval {x.format(runs=runs)} --activations {runs}/{name}_{stat}.svg --n {n}"
            lines.append(f"{line} --name {name}" + ("" if stat == "mean_abs" else f" --act-stat {stat}"))
    return lines


def measure(runs: str) -> dict[str, Any]:
    """Everything, and the pictures into docs/."""
    lines, records, by = commands(runs), {}, made_by("teacher_digits", CHANGES)  # before pictures are changed
    for line in lines:
        target = next((ROOT / word for word in line.split() if word.endswith(".svg")), None)
        if target is None or not target.with_suffix(".json").exists():
            run(line)
        if target is None:
            continue
        record = json.loads(target.with_suffix(".json").read_text())
        if "mean_abs" in target.name:
            shutil.copy(target, ROOT / "docs" / f"activations_{target.stem.removesuffix('_mean_abs')}.svg")
        else:  # where they are greatest is enough
            record = {k: v for k, v in record.items() if k not in ("i", "sigma")}
            record["layers"] = [{k: v for k, v in layer.items() if k != "values"} for layer in record["layers"]]
        for layer in record["layers"]:
            layer["maxima"] = [len(layer["maxima"]), *layer["maxima"][:MAXIMA]]
        records[target.stem] = record
    return {"commands": lines, **by, "records": records}


def table(record: dict[str, Any]) -> str:
    """A row for each layer: the noise levels at which it is most active, by each statistic."""
    head = ["part", "depth", *(f"{name}, {stat}" for name in TEACHERS for stat in STATS)]
    lines = [head, ["---", "---:", *["---:"] * (len(head) - 2)]]
    found = {key: r for key, r in record["records"].items()}
    first = next(iter(found.values()))["layers"]
    for part in ("encoder", "decoder"):
        for depth in sorted(layer["depth"] for layer in first if layer["part"] == part):
            cells = []
            for name in TEACHERS:
                for stat in STATS:
                    layers = found.get(f"{name}_{stat}", {"layers": []})["layers"]
                    at = [x["peak"]["sigma"] for x in layers if (x["part"], x["depth"]) == (part, depth)]
                    cells.append(f"{at[0]:.3g}" if at else "")
            lines.append([part, str(depth), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/activations")
    made = measure(parser.parse_args().runs)
    (ROOT / "results" / "activations.json").write_text(compact_json(made))
    import results

    results.write()
