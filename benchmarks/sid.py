"""Images/s of the training loop with method sid over a bare hand-written iteration of the same algorithm, and the
memory of both.

    python benchmarks/sid.py [--quick] [--device cuda] [--out FILE.json]

SiD, and SiDA in its last phase (both losses), with the teacher `digits` and with a wider EDM network of random weights
(CUDA: CIFAR-10's size). The bare iteration has the same networks, optimisers, clipping and moving average; it reads
nothing, logs nothing and checks nothing. Blocks of both
alternate in one process: the bare one runs while the loop waits in its progress callback. The median ratio of
neighbouring blocks is reported.
Target: 0.9. Peak memory is that of a process of its own for each case. Beside it what saves memory and what that costs:
checkpointing, the true score in bf16, micro-batches; and SiDA's score and map from one pass of the score network
against a pass for each.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sid_bare import IMAGES, Bare

from d2o.evaluation.protocol import hardware
from d2o.interop.safetensors_io import save_file
from d2o.networks.build import build_network
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.students.base import checkpoint_meta
from d2o.teachers.base import Spec
from d2o.training.loop import Trainer
from d2o.training.setup import prepare

RESULTS = Path(__file__).parent / "results"
WIDE: dict[str, dict[str, Any]] = {
    "cpu": {
        "img_resolution": 16,
        "model_channels": 64,
        "channel_mult": [1, 2],
        "num_blocks": 2,
        "attn_resolutions": [8],
        "dropout": 0.1,
    },
    "cuda": {
        "img_resolution": 32,
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "dropout": 0.13,
    },
}
BATCH = {"digits": {"cpu": 128, "cuda": 256}, "wide": {"cpu": 32, "cuda": 64}}
SIDA = ("sid.start_g_nimg=0", "sid.start_adv_nimg=0")  # from the second iteration on both losses
LEVERS = {
    "plain": "",
    "checkpointing": "checkpointing=true",
    "true score in bf16": "sid.teacher_precision=bf16",
    "micro-batches of a quarter": "micro_batch={quarter}",
}


def make_wide(folder: Path, device: str) -> None:
    """A teacher of random weights, and random images of its shape."""
    config = {"arch": "ddpmpp", "img_channels": 3, "label_dim": 10, "sigma_data": 0.5, **WIDE[device]}
    torch.manual_seed(0)
    network, size = build_network(dict(config)), config["img_resolution"]
    with torch.no_grad():
        for p in network.parameters():  # some begin at almost 0, where arithmetic may be slower
            p.add_(0.01 * torch.randn_like(p))
    spec = Spec("wide", (3, size, size), condition="label", classes=10)
    save_file(folder / "wide.safetensors", network.state_dict(), checkpoint_meta("teacher", config, spec))
    random = np.random.default_rng(0)
    np.savez(
        folder / "wide.npz",
        arr_0=random.integers(0, 256, (IMAGES, size, size, 3), np.uint8),
        labels=random.integers(0, 10, IMAGES),
    )


def make_trainer(case: dict[str, Any], folder: Path, run: str, block: int = 1, blocks: int = 1) -> Trainer:
    """The loop as `d2o train` makes it, for `blocks` lines of the log; without evaluation, preview and checkpoints on
    the way."""
    batch, device = BATCH[case["network"]][case["device"]] // (4 if case["quick"] else 1), torch.device(case["device"])
    overrides = [
        "eval=null",
        "preview=null",
        f"checkpoint.every={10**9}",
        "checkpoint.keep=0",
        f"batch={batch}",
        f"log_every={block}",
        f"images={batch * block * blocks}",
        *([*SIDA, f"sid.batch_pool={min(batch, 32)}"] if case["method"] == "sida" else []),
    ]
    if case["network"] == "wide":
        overrides += [f"teacher={folder / 'wide.safetensors'}", "optim.lr=1e-5"]
        overrides += [f"data.path={folder / 'wide.npz'}", "optim_critic.lr=1e-5"] if case["method"] == "sida" else []
    lever = LEVERS[case.get("lever", "plain")].format(quarter=batch // 4)
    recipe = load_recipe(f"{case['method']}_digits", [*overrides, *([lever] if lever else [])])
    setup = prepare(recipe, device, None, lambda message: None, lambda done, total, note: None, StopFlag())
    (folder / run).mkdir()
    return Trainer(recipe, setup, folder / run)


def wait(device: torch.device) -> float:
    """The time when the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def race(case: dict[str, Any], folder: Path, block: int, blocks: int) -> dict[str, Any]:
    """Images/s of the loop and of the bare iteration, `blocks` times `block` iterations of each, the first of which
    warm up."""
    trainer = make_trainer(case, folder, f"race-{case['network']}-{case['method']}", block, blocks + 1)
    bare, batch, device = Bare(trainer), trainer.recipe.batch, trainer.device
    ours: list[float] = []
    theirs: list[float] = []
    left = wait(device)

    def turn(done: int, note: str) -> None:
        nonlocal left
        now = wait(device)
        ours.append(block * batch / (now - left))
        for _ in range(block):
            bare.step()
        left = wait(device)
        theirs.append(block * batch / (left - now))

    trainer.run(turn, StopFlag())
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "loop_images_per_s": round(statistics.median(ours[1:]), 1),
        "baseline_images_per_s": round(statistics.median(theirs[1:]), 1),
        "batch": batch,
        "parameters": sum(p.numel() for p in bare.score.parameters()),
    }


def stepper(trainer: Trainer) -> Callable[[], None]:
    """An iteration of the loop without its log."""

    def step() -> None:
        batch = trainer.batches.get(trainer.iteration)
        trainer.norms.clear()
        trainer.method.step(trainer, batch, trainer.iteration)
        trainer.ema.update(trainer.networks["student"], trainer.iteration * trainer.recipe.batch, trainer.recipe.batch)
        trainer.method.settle()
        trainer.iteration += 1

    return step


def worker(case: dict[str, Any], folder: Path, run: str) -> Callable[[], None]:
    """One iteration of the case: of the loop, or of the bare one ("bare": its passes)."""
    trainer = make_trainer(case, folder, run)
    return Bare(trainer, case["bare"]).step if "bare" in case else stepper(trainer)


def compare(cases: dict[str, dict[str, Any]], folder: Path, block: int, blocks: int) -> dict[str, float]:
    """Images/s of each in blocks that alternate, over those of the first: medians."""
    steps = {
        name: worker(case, folder, f"compare-{i}-{case['method']}") for i, (name, case) in enumerate(cases.items())
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    device = torch.device(next(iter(cases.values()))["device"])
    for step in steps.values():  # SiDA's second loss begins with the second iteration
        step()
        step()
    for _ in range(blocks):
        for name, step in steps.items():
            start = wait(device)
            for _ in range(block):
                step()
            found[name].append(1 / (wait(device) - start))
    first = found[next(iter(cases))]
    return {
        name: round(statistics.median(a / b for a, b in zip(rates, first, strict=True)), 3)
        for name, rates in found.items()
    }


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most (`ru_maxrss` would count the parent's, of which this one was
    forked)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def child(case: dict[str, Any], folder: Path, run: str) -> None:
    """Prints [bytes before the first iteration, peak bytes] of a few iterations."""
    step = worker(case, folder, run)
    gc.collect()  # the trainer that the bare iteration was copied from ...
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # ... and its memory, which would be used again
    cuda = case["device"] == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    print(json.dumps([before, torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")]))


def peak(case: dict[str, Any], folder: Path, run: str) -> dict[str, float]:
    """Peak memory of a case in MiB, and how much of it came with the iterations (gradients, moments, activations)."""
    words = [sys.executable, __file__, "--child", json.dumps({"case": case, "folder": str(folder), "run": run})]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    before, most = json.loads(done.stdout.splitlines()[-1])
    return {"peak_mb": round(most / 2**20, 1), "iterations_mb": round((most - before) / 2**20, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smaller batches, fewer and shorter blocks; writes no file unless --out is given",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sid.json, on CUDA sid-cuda.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        asked = json.loads(options.child)
        child(asked["case"], Path(asked["folder"]), asked["run"])
        return
    device, quick = options.device, options.quick
    block, blocks = {"digits": 2 if quick else 10, "wide": 1 if quick else 2}, 2 if quick else 7
    report: dict[str, Any] = {
        "benchmark": "sid",
        "what": "images/s of the training loop over a bare hand-written iteration, same process",
        "target": 0.9,
        "loop": {},
        "levers": {},
        "passes": {},
    }
    count = 0

    def measured(case: dict[str, Any]) -> dict[str, float]:
        nonlocal count
        count += 1
        return peak(case, folder, f"peak{count}")

    def tell(name: str, row: dict[str, Any]) -> None:
        print(name, "  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_wide(folder, device)
        for network in ("digits", "wide"):
            for method in ("sid", "sida"):
                case = {"network": network, "method": method, "device": device, "quick": quick}
                row = race(case, folder, block[network], blocks)
                row["memory"], row["baseline_memory"] = measured(case), measured({**case, "bare": 1})
                report["loop"][f"{method} {network}"] = row
                tell(f"{method} {network}:", row)
        wide = {"network": "wide", "method": "sid", "device": device, "quick": quick}
        levers = {lever: {**wide, "lever": lever} for lever in LEVERS}
        passes = {
            "one pass": {**wide, "method": "sida", "bare": 1},
            "two passes": {**wide, "method": "sida", "bare": 2},
        }
        for part, cases in (("levers", levers), ("passes", passes)):
            speeds = compare(cases, folder, block["wide"], blocks)
            for name, case in cases.items():
                report[part][name] = {"speed": speeds[name], **measured(case)}
                tell(f"{name}:", report[part][name])
    report |= {"quick": quick, "date": datetime.date.today().isoformat(), **hardware(device)}
    print(json.dumps(report, indent=1))
    out = options.out or (None if quick else RESULTS / ("sid.json" if device == "cpu" else "sid-cuda.json"))
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
