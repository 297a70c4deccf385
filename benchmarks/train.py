"""Images/s of the training loop over a hand-written loop that does only the arithmetic: forward, loss, backward,
optimiser, EMA.

    python benchmarks/train.py [--quick]

Both train the same student of `digits` on the same pairs in the same process, in alternating blocks; the ratio of the
medians is printed as JSON with what it ran on. The hand-written loop reads nothing, logs nothing, checks nothing.
Target: 0.9.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from d2o.data.pair_settings import PairSettings
from d2o.data.pairs import PairStore
from d2o.evaluation.protocol import hardware
from d2o.recipes.load import load_recipe
from d2o.runtime import StopFlag
from d2o.students.base import Student
from d2o.teachers.generate import make_pairs
from d2o.training.loop import Trainer
from d2o.training.setup import prepare


def bare(student: Student, store: PairStore, batch: int, iterations: int) -> float:
    """Seconds for `iterations` iterations of mean squared error regression with Adam and an EMA."""
    ema = copy.deepcopy(student)
    parameters = list(student.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, foreach=True)
    noise, condition, target = store.batch(torch.arange(len(store)))
    labels = condition.labels
    start = time.perf_counter()
    for i in range(iterations):
        index = torch.arange(i * batch, (i + 1) * batch) % len(store)
        loss = (student(noise[index], labels[index]) - target[index]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in parameters], 0.01)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks")
    quick = parser.parse_args().quick
    blocks, iterations, batch = (3, 10, 128) if quick else (7, 40, 128)
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs"
        make_pairs(PairSettings("digits", 512, solver="euler", steps=2), pairs)
        overrides = [
            f"pairs.path={pairs}",
            "pairs.n=512",
            "pairs.solver=euler",
            "pairs.steps=2",
            "ode.loss=mse",
            "eval=null",
            "preview=null",
            f"batch={batch}",
            f"images={batch * iterations}",
            f"checkpoint.every={10**9}",
            "checkpoint.keep=0",
        ]
        recipe = load_recipe("quickstart", overrides)
        ours, theirs = [], []
        for block in range(blocks + 1):
            setup = prepare(
                recipe, torch.device("cpu"), None, lambda message: None, lambda done, total, note: None, StopFlag()
            )
            assert setup.pairs is not None
            trainer = Trainer(recipe, setup, Path(folder) / f"run{block}")
            (Path(folder) / f"run{block}").mkdir()
            trainer.run(lambda done, note: None, StopFlag())
            log = [
                json.loads(line) for line in (Path(folder) / f"run{block}" / "metrics.jsonl").read_text().splitlines()
            ]
            student = copy.deepcopy(trainer.ema.network).requires_grad_(True).train()
            assert isinstance(student, Student)
            seconds = bare(student, setup.pairs, batch, iterations)
            if block:  # the first block warms up
                ours.append(statistics.median(line["images_per_s"] for line in log))
                theirs.append(batch * iterations / seconds)
    result = {
        "benchmark": "train",
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 3),
        "target": 0.9,
        "loop_images_per_s": round(statistics.median(ours), 1),
        "baseline": "hand-written loop, same network, same pairs, same process",
        "baseline_images_per_s": round(statistics.median(theirs), 1),
        "batch": batch,
        "date": datetime.date.today().isoformat(),
        **hardware(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
