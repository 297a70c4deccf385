"""The results table: measure rows (`python tools/results.py ROW ...`), or only write the tables from results/*.json
(`make results`).

Every row is one file results/ROW.json: the commands that made it, the recipe, the training budget that was used, and
d2o's own record of the evaluation with its protocol and hardware. The tables and commands in docs/results.md and
README.md are generated from these files and from nothing else.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVAL = "d2o eval {x} --against {reference} --name {name}{repeats} --json {json}"
REPEATS = 5
"""Blocks of seeds that what is generated is measured on; the table shows mean and standard deviation."""

ROWS: dict[str, dict[str, Any]] = {
    "real_halves": {"name": "real halves", "x": "real:digits/a", "reference": "real:digits/b"},
    "teacher": {"name": "teacher", "x": "digits"},
    "teacher_once": {"name": "teacher called once", "x": "digits --solver euler --steps 1"},
    "ode_mse": {"name": "ode, mse", "train": "ode_digits:mse"},
    "ode_l1": {"name": "ode, l1", "train": "ode_digits:l1"},
    "ode_pseudo_huber": {"name": "ode, pseudo-Huber", "train": "ode_digits:pseudo_huber"},
    "ode_perceptual": {"name": "ode, perceptual", "train": "ode_digits:perceptual"},
    "ode_rewired": {"name": "ode, mse, permuted pairs", "train": "ode_digits:rewired"},
    "ode_sde": {"name": "ode, mse, stochastic pairs", "train": "ode_digits:sde"},
    "spi_gan": {"name": "SPI-GAN, K = 2", "train": "spi_gan_digits", "set": "threads=1"},
    "spi_gan_fixed_j": {"name": "SPI-GAN, K = 2, fixed j", "train": "spi_gan_digits:fixed_j", "set": "threads=1"},
    "spi_gan_k1": {"name": "SPI-GAN, K = 1", "train": "spi_gan_digits:k1", "set": "threads=1"},
    "dd_gan": {"name": "DD-GAN, K = 4", "train": "dd_gan_digits", "set": "threads=1"},
    "dd_gan_k1": {"name": "DD-GAN, K = 1", "train": "dd_gan_digits:k1", "set": "threads=1"},
    "sid": {"name": "SiD, alpha 1.2", "train": "sid_digits", "set": "threads=1"},
    "sida": {"name": "SiDA", "train": "sida_digits", "set": "threads=1"},
    "sid2a": {
        "name": "SiD2A",
        "train": "sid2a_digits",
        "from": "runs/sid_digits/checkpoints/last.safetensors",
        "set": "threads=1",
    },
    "cd": {"name": "CD", "train": "cd_digits", "set": "threads=1"},
    "cd_2": {"name": "CD, 2 calls", "train": "cd_digits", "set": "threads=1", "with": "--steps 2"},
    "cd_i": {"name": "CD-I", "train": "cd_digits:cd_i", "run": "cd_i_digits", "set": "threads=1"},
    "pd": {"name": "PD", "train": "pd_digits", "set": "threads=1"},
    "ctm": {"name": "CTM", "train": "ctm_digits", "set": "threads=1"},
    "ctm_2": {"name": "CTM, 2 calls", "train": "ctm_digits", "set": "threads=1", "with": "--steps 2"},
    "dmd": {"name": "DMD", "train": "dmd_digits", "set": "threads=1"},
    "diff_instruct": {"name": "Diff-Instruct", "train": "diff_instruct_digits", "set": "threads=1"},
}
SHOWN = ("teacher", "ode_pseudo_huber", "sid", "sida", "dmd", "diff_instruct", "pd", "cd")
"""The rows that the README shows: eight at most."""


def commands(row: str) -> list[str]:
    """The command lines that make a row, as a reader would type them."""
    spec, train = ROWS[row], ROWS[row].get("train")
    x = spec.get("x") or f"runs/{run_of(row)}/checkpoints/last.safetensors"
    x += f" {spec['with']}" if "with" in spec else ""
    line = EVAL.format(
        x=x,
        reference=spec.get("reference", "real:digits"),
        name=shlex.quote(spec["name"]),
        repeats="" if x.startswith("real:") else f" --repeats {REPEATS}",
        json=f"runs/results/{row}.json",
    )
    settings = f" --set {spec['set']}" if "set" in spec else ""  # part of what `--resume` compares
    verb, start = ("finetune", f" --from {spec['from']}") if "from" in spec else ("train", "")
    return ([f"d2o {verb} {train}{start}{settings} --resume"] if train else []) + [line]


def run_of(row: str) -> str:
    """The name of its run: the recipe's, with the variant's behind it."""
    return str(ROWS[row].get("run") or ROWS[row]["train"].replace(":", "_"))


def measure(row: str) -> None:
    for line in commands(row):
        print(f"$ {line}", flush=True)
        subprocess.run([sys.executable, "-m", "d2o", *shlex.split(line)[1:]], check=True, cwd=ROOT)
    record: dict[str, Any] = {"row": row, "name": ROWS[row]["name"], "commands": commands(row)}
    record["eval"] = json.loads((ROOT / "runs" / "results" / f"{row}.json").read_text())
    record["eval"].pop("grid", None)  # pictures are in the report, not in the repository
    if "train" in ROWS[row]:
        record["training"] = training(ROOT / "runs" / run_of(row))
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / f"{row}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def training(run: Path) -> dict[str, Any]:
    """Recipe and budget of a run, from its own files."""
    import yaml

    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    return {"recipe": recipe, "seed": recipe["seed"], **budget(run)}


def budget(run: Path) -> dict[str, Any]:
    """Images and minutes of a run, from its log."""
    steps = [
        line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "images_per_s" in line
    ]
    seconds = sum((b["images"] - a["images"]) / b["images_per_s"] for a, b in zip([{"images": 0}, *steps], steps))
    return {"images": steps[-1]["images"], "minutes": round(seconds / 60, 2)}


def cells(record: dict[str, Any]) -> list[str]:
    metrics, training = record["eval"]["metrics"], record.get("training")
    speed, accuracy, distance = metrics.get("speed") or {}, metrics.get("accuracy"), metrics.get("distance") or {}
    accuracy = accuracy["value"] if accuracy else None
    return [
        record["name"],
        f"{metrics['fd']['value']:.2f}" + (f" ± {metrics['fd']['std']:.2f}" if metrics["fd"].get("std") else ""),
        "" if accuracy is None else f"{100 * accuracy:.1f} %",
        str(record["eval"]["x"].get("nfe", "")),
        f"{speed['samples_per_s']:,.0f}" if speed.get("samples_per_s") else "",
        f"{distance['rmse']:.3f}" if distance.get("rmse") is not None else "",
        f"{training['images']:,}" if training else "",
        f"{training['minutes']:.1f}" if training else "",
    ]


HEADER = ["", "FD(digits)", "accuracy", "NFE", "samples/s", "rmse to teacher", "images trained", "minutes"]


def table(records: list[dict[str, Any]]) -> str:
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)], *[cells(r) for r in records]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put(path: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of that name."""
    page, begin, end = path.read_text(), f"<!-- {name}: generated by `make results` -->", f"<!-- end of {name} -->"
    start, stop = page.index(begin) + len(begin), page.index(end)
    path.write_text(f"{page[:start]}\n{text}\n{page[stop:]}")


def write() -> None:
    records = [json.loads(path.read_text()) for row in ROWS if (path := ROOT / "results" / f"{row}.json").exists()]
    if not records:
        sys.exit("no results/*.json; measure some rows first")
    protocol, env = records[1 if len(records) > 1 else 0]["eval"]["protocol"], records[-1]["eval"]["env"]
    seeds, halves = protocol["seeds"], records[0]["eval"]["protocol"]["n_ref"]
    threads = " or ".join(sorted({str(r["eval"]["env"]["threads"]) for r in records}))
    footer = (
        f"Fréchet distance over {protocol['features']} features (weights {str(protocol['weights_sha256'])[:12]}),"
        f" {protocol['n_gen']:,} images at a time, seeds {seeds[0]}..{seeds[1]} where generated (mean and standard"
        f" deviation of {REPEATS} blocks, the same ones in every row: what is hard for one is hard for all), quantised"
        f" to 8 bits, reference {protocol['ref']} (n = {protocol['n_ref']}; the real halves against each other, n ="
        f" {halves}); {env['cpu']}, {threads} threads, torch {env['torch']}. Minutes are those of the run's own log:"
        " the students of `ode` on 2 cores, the others on one core beside other work. It is not FID: the features are"
        " a small classifier's."
    )
    put(ROOT / "README.md", "results", table([record for record in records if record["row"] in SHOWN]))
    put(ROOT / "docs" / "results.md", "results", f"{table(records)}\n\n{footer}")
    parts = [f"**{record['name']}**\n\n```\n" + "\n".join(commands(record["row"])) + "\n```" for record in records]
    put(ROOT / "docs" / "results.md", "commands", "\n\n".join(parts))
    if (path := ROOT / "results" / "latent_lpips.json").exists():
        from latent_lpips import tables

        put(ROOT / "docs" / "results.md", "latent_lpips", tables(json.loads(path.read_text())))
    if (path := ROOT / "results" / "activations.json").exists():
        from activations import table as layers

        put(ROOT / "docs" / "results.md", "activations", layers(json.loads(path.read_text())))
    from table_results import COLUMNS, load_table
    from table_results import write as write_rows

    for name in COLUMNS:
        write_rows(name, load_table(name))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        measure(name)
    write()
