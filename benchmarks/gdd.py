"""Where an iteration of GDD spends its time, and what channels_last, torch.compile and bf16 bring.

    python benchmarks/gdd.py [--quick] [--compile] [--device cuda] [--out FILE.json]

The recipe `gdd_digits`, and a wider EDM network of random weights (CUDA: CIFAR-10's size, the critic at 224 pixels)
with the same critic. Shares: the passes that an iteration makes through each part, timed by themselves, over a whole
iteration of the loop beside them (medians); "rest" is optimisers, averages, power iterations. Levers: images/s of loops
with one setting changed over those of the plain loop (float32, contiguous, eager), in blocks that alternate; compiling
is not timed. On a CPU seconds are those of processor time: whatever else runs there counts little.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sid import make_wide
from torch import Tensor

from d2o.critics.projected import ProjectedCritic
from d2o.evaluation.protocol import hardware
from d2o.losses.adversarial import critic_loss, generator_loss
from d2o.methods.gdd import GDD
from d2o.networks.processor import bf16_unit
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.training.loop import Trainer
from d2o.training.setup import prepare

RESULTS = Path(__file__).parent / "results"
BATCH = {"digits": {"cpu": 16, "cuda": 256}, "wide": {"cpu": 32, "cuda": 64}}
PLAIN = ("precision=fp32", "channels_last=false", "compile=false")
LEVERS = {
    "plain": PLAIN[0],
    "channels_last": "channels_last=true",
    "compile": "compile=true",
    "bf16": "precision=bf16",
}


def make_trainer(network: str, device: str, quick: bool, folder: Path, run: str, lever: str = "plain") -> Trainer:
    """The loop as `d2o train` makes it, without evaluation, preview and checkpoints on the way."""
    batch = BATCH[network][device] // (4 if quick else 1)
    overrides = ["eval=null", "preview=null", f"checkpoint.every={10**9}", "checkpoint.keep=0", f"batch={batch}"]
    overrides += [f"images={10**6 * batch}", f"gdd.critic.pool={batch}", *PLAIN, LEVERS[lever]]
    if network == "wide":
        overrides += [f"teacher={folder / 'wide.safetensors'}", f"data.path={folder / 'wide.npz'}", "optim.lr=1e-5"]
        overrides += ["gdd.critic.size=224"] if device == "cuda" else []
    recipe = load_recipe("gdd_digits", overrides)
    setup = prepare(
        recipe, torch.device(device), None, lambda message: None, lambda done, total, note: None, StopFlag()
    )
    (folder / run).mkdir()
    return Trainer(recipe, setup, folder / run)


def clock(device: torch.device) -> float:
    """CUDA: when the device has done all it was asked. CPU: the processor time of this process."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(trainer: Trainer, work: Callable[[], Any]) -> float:
    """Time of that work on the trainer's device."""
    start = clock(trainer.device)
    work()
    return clock(trainer.device) - start


def looked(critic: ProjectedCritic, x: Tensor) -> list[list[Tensor]]:
    """The maps of each backbone, behind its projections."""
    return [critic.look(i, x) for i in range(len(critic.backbones))]


def judged(critic: ProjectedCritic, maps: list[list[Tensor]], labels: Tensor | None) -> list[Tensor]:
    rows = zip(critic.heads, maps, strict=True)
    return [torch.cat([head(y, labels) for head, y in zip(heads, ys, strict=True)], 1) for heads, ys in rows]  # type: ignore[call-overload]


def parts(trainer: Trainer) -> dict[str, Callable[[], Any]]:
    """What an iteration does with the student, with the backbones and their projections, and with the heads; and R1."""
    method, batch = trainer.method, trainer.batches.get(0)
    assert isinstance(method, GDD) and isinstance(method.critic, ProjectedCritic)
    critic, loss = method.critic, method.options.loss
    micro, draw = next(iter(trainer.micro_batches(batch)))
    z, embedded = draw.randn(*method.student.spec.shape), method.asked(method.condition_of(micro))
    labels, real = method.labels(micro), method.real_images(micro, draw)
    student, fake = trainer.net("student"), torch.zeros_like(real)

    def student_twice() -> None:
        """The student's step goes both ways, the critic's only forward."""
        out = student(z, embedded)
        out.backward(torch.ones_like(out))
        with torch.no_grad():
            student(z, embedded)

    def backbones_thrice() -> None:
        """The student's step goes both ways, the critic's looks at made and real images."""
        x = fake.clone().requires_grad_()
        maps = [y for ys in looked(critic, x) for y in ys]
        torch.autograd.grad([y.sum() for y in maps], x)
        with torch.no_grad():
            looked(critic, fake), looked(critic, real)

    def heads_thrice() -> None:
        """Through the heads to the maps in the student's step; to the heads' weights in the critic's."""
        for p in critic.parameters():
            p.requires_grad_(False)
        given = [[y.clone().requires_grad_() for y in ys] for ys in seen]
        paid = generator_loss(judged(critic, given, labels), loss).mean()
        torch.autograd.grad(paid, [y for ys in given for y in ys])
        for p in critic.heads.parameters():
            p.requires_grad_(True)
        paid = critic_loss(judged(critic, seen, labels), judged(critic, seen, labels), loss).mean()
        torch.autograd.grad(paid, list(critic.heads.parameters()))

    with torch.no_grad():
        seen = looked(critic, real)
    return {
        "student": student_twice,
        "backbones": backbones_thrice,
        "heads": heads_thrice,
        "r1": lambda: method.penalty_step(trainer, batch, {}),
    }


def shares(trainer: Trainer, rounds: int) -> dict[str, Any]:
    """The parts of a mean iteration, R1's steps among them in their proportion: medians over rounds, in each of which a
    whole iteration is timed beside all parts."""
    found: dict[str, list[float]] = {}
    method, pieces = trainer.method, parts(trainer)
    assert isinstance(method, GDD)
    for _ in range(rounds + 1):  # the first warms up
        trainer.iteration = 1  # R1 has iterations of its own
        plain = seconds(trainer, trainer.iterate)
        times = {name: seconds(trainer, work) for name, work in pieces.items()}
        times["r1"] /= method.options.r1.interval
        whole = plain + times["r1"]
        times["rest"] = whole - sum(times.values())
        for name, value in times.items():
            found.setdefault(name, []).append(value / whole)
        found.setdefault("images_per_s", []).append(trainer.recipe.batch / whole)
    medians = {name: statistics.median(values[1:]) for name, values in found.items()}
    rate = medians.pop("images_per_s")
    named = {name: round(value, 3) for name, value in medians.items()}
    return {"images_per_s": round(rate, 1), "batch": trainer.recipe.batch, "shares": named}


def levers(trainers: dict[str, Trainer], block: int, blocks: int) -> dict[str, float]:
    """Images/s of each over those of "plain": medians over neighbouring blocks, without R1."""
    found: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        for _ in range(2):  # compiles, and fills what is cached
            trainer.iterate()
    for _ in range(blocks):
        for name, trainer in trainers.items():
            trainer.iteration, start = 1, clock(trainer.device)
            for _ in range(block):
                trainer.iterate()
            found[name].append(1 / (clock(trainer.device) - start))
    pairs = {name: zip(rates, found["plain"], strict=True) for name, rates in found.items()}
    return {name: round(statistics.median(a / b for a, b in each), 3) for name, each in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="smaller batches, fewer blocks; writes no file unless --out is given"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too; on a CPU it takes many minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gdd.json, on CUDA gdd-cuda.json")
    options = parser.parse_args()
    device, quick = options.device, options.quick
    report: dict[str, Any] = {
        "benchmark": "gdd",
        "what": "parts of an iteration over the whole; images/s with one setting changed over the plain loop's",
        "bf16": bf16_unit(torch.device(device)) or "imitated",
        "load": [round(value, 1) for value in os.getloadavg()],  # of what else ran here
        "shares": {},
        "levers": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_wide(folder, device)
        for network in ("digits", "wide"):
            torch.compiler.reset()  # else sizes that changed between the networks become unknowns of what is compiled
            names = [lever for lever in LEVERS if options.compile or lever != "compile"]
            made = {name: make_trainer(network, device, quick, folder, f"{network}-{name}", name) for name in names}
            report["shares"][network] = shares(made["plain"], 2 if quick else 7)
            print(network, report["shares"][network], file=sys.stderr, flush=True)
            report["levers"][network] = levers(made, 1 if quick else 2, 2 if quick else 5)
            print(network, report["levers"][network], file=sys.stderr, flush=True)
    report |= {"quick": quick, "date": datetime.date.today().isoformat(), **hardware(device)}
    print(json.dumps(report, indent=1))
    out = options.out or (None if quick else RESULTS / ("gdd.json" if device == "cpu" else "gdd-cuda.json"))
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
