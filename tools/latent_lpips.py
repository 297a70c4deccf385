"""What the LatentLPIPS that ships for `tiny-sd`'s latents is worth: results/latent_lpips.json, and docs/results.md.

    python tools/latent_lpips.py [--runs runs/latent_lpips]

Measures what is not measured yet: 2AFC on distortions that neither training nor selection drew, beside mean squared
errors; and the reconstruction of single images under each distance (recipes/latent_reconstruction.yaml, its `mini:`).
The picture and the curves of the latter go to docs/.
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

from d2o.reports.curves import read_curves
from results import made_by, put

ROOT = Path(__file__).resolve().parent.parent
JUDGES = "latent-lpips-tiny-sd latent-mse-tiny-sd mse"
VARIANTS = "none,b,bg,bgc,bgco,lpips"
AFTER = (100, 200, 2000)
"""Steps after which the table shows the curves."""


def run(line: str) -> None:
    print(f"$ {line}", flush=True)
    subprocess.run([sys.executable, "-m", "d2o", *shlex.split(line)[1:]], check=True, cwd=ROOT)


def reconstruction(folder: Path) -> dict[str, Any]:
    sweep = json.loads((folder / "sweep.json").read_text())
    rows = {}
    for member in sweep["members"]:
        curves = read_curves(folder / member["folder"]).scores
        rows[member["settings"]["variant"]] = {
            key: [[round(x / sweep["recipe"]["batch"]), y] for x, y in curves[key]] for key in ("distance", "pixel_mse")
        }
    return {"batch": sweep["recipe"]["batch"], "lr": sweep["recipe"]["optim"]["lr"], "curves": rows}


def at(curve: list[list[float]], step: int) -> str:
    found = [y for x, y in curve if x == step]
    return f"{found[0]:.4f}" if found else ""


def tables(record: dict[str, Any]) -> str:
    def lines(rows: list[list[str]]) -> str:
        marks = ["---", *["---:"] * (len(rows[0]) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], marks, *rows[1:]])

    kinds = [*record["2afc"][0]["metrics"]["2afc"]["per_class"]]
    first = [["2AFC", "mean", *kinds]]
    for one in record["2afc"]:
        entry = one["metrics"]["2afc"]
        shares = [f"{100 * entry['per_class'][kind]:.1f} %" for kind in kinds]
        first.append([one["name"], f"{100 * entry['value']:.1f} ± {100 * entry['std']:.1f} %", *shares])
    heads = [f"{what}, {n:,} steps" for what in ("pixel MSE", "LatentLPIPS") for n in AFTER]
    second = [["distance that is minimised", *heads]]
    for name, curves in record["reconstruction"]["curves"].items():
        second.append([f"`{name}`", *(at(curves[key], n) for key in ("pixel_mse", "distance") for n in AFTER)])
    return f"{lines(first)}\n\n{lines(second)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/latent_lpips"))
    runs = parser.parse_args().runs
    answers, sweep = runs / "2afc.json", runs / "reconstruction"
    commands = [
        f"d2o eval {JUDGES} --against real:digits-2afc/b --repeats 3 --json {answers}",
        f"d2o train recipes/latent_reconstruction.yaml --mini --sweep variant={VARIANTS} --out {sweep} --set threads=1",
    ]
    (ROOT / runs).mkdir(parents=True, exist_ok=True)
    if not (ROOT / answers).exists():
        run(commands[0])
    run(commands[1])
    record = {
        "what": "the LatentLPIPS that ships for tiny-sd: agreement with the known order of distorted digits, and the "
        "reconstruction of digits from noise under it",
        "commands": commands,
        "2afc": json.loads((ROOT / answers).read_text()),
        "reconstruction": reconstruction(ROOT / sweep),
        **made_by("latent_reconstruction:lpips"),
    }
    (ROOT / "results" / "latent_lpips.json").write_text(json.dumps(record, indent=1) + "\n")
    for name in ("svg", "png"):
        shutil.copy(ROOT / sweep / f"sweep.{name}", ROOT / "docs" / f"latent_reconstruction.{name}")
    put(ROOT / "docs" / "results.md", "latent_lpips", tables(record))
    print(tables(record))


if __name__ == "__main__":
    main()
