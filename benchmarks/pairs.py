"""Pairs/s of `d2o pairs`, to disk and all, times its network calls per pair, over the calls/s of the bare network.

    python benchmarks/pairs.py [--quick] [--teacher digits]

The baseline calls the teacher's network in a loop, in inference mode, at the batch size (of 32 to 512) at which it is
fastest, and keeps nothing. Pairs are made with Heun, 18 steps (35 calls), at the same batch size and the same threads,
in the same process; blocks of both alternate, and the median of the ratios of neighbouring blocks is printed as JSON.
Target: 0.85. Beside it stands how fast a store is read at random and in a shuffled stream (target: 20,000/s).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from d2o.data.pair_settings import PairSettings
from d2o.data.pairs import PairStore
from d2o.data.stream import PairStream
from d2o.evaluation.protocol import hardware
from d2o.teachers.base import Teacher
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.teachers.registry import load_teacher

BATCHES = (32, 64, 128, 256, 512)


def bare_rate(teacher: Teacher, batch: int, seconds: float) -> float:
    """Network outputs a second."""
    noise, labels = torch.randn(batch, *teacher.spec.shape), torch.arange(batch) % teacher.spec.classes
    sigma, calls = torch.full((batch,), 3.0), 0
    with torch.inference_mode():
        teacher.network(noise, sigma, labels)
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            teacher.network(noise, sigma, labels)
            calls += 1
    return calls * batch / spent


def pair_rate(teacher: Teacher, batch: int, n: int) -> float:
    """Pairs a second, from nothing to a finished store of two shards."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make_pairs(
            PairSettings("bench", n, shard_size=n // 2), Path(folder) / "pairs", compute=Compute(batch), teacher=teacher
        )
        return n / (time.perf_counter() - start)


def read_rate(n: int, batch: int) -> float:
    """Pairs a second of PairStore.batch at random indices, once the store is in memory."""
    with tempfile.TemporaryDirectory() as folder:
        settings = PairSettings("digits", n, solver="euler", steps=1)
        store: PairStore = make_pairs(settings, Path(folder) / "pairs")
        store.batch([0])
        rounds, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < 1:
            store.batch(torch.randint(n, (batch,)))
            rounds += 1
    return rounds * batch / spent


def stream_rate(n: int, batch: int) -> float:
    """Pairs a second of PairStream over one epoch, group after group, noise derived from the seeds."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_pairs(
            PairSettings("digits", n, solver="euler", steps=1), Path(folder) / "pairs", compute=Compute(512)
        )
        assert store is not None
        seen, start = 0, time.perf_counter()
        with PairStream(store, batch, buffer=16) as stream:
            for noise, _, _ in itertools.islice(stream, n // batch):
                seen += len(noise)
        return seen / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks")
    parser.add_argument("--teacher", default="digits", help="builtin teacher or checkpoint, on the CPU")
    options = parser.parse_args()
    blocks, seconds, groups = (3, 1.0, 2) if options.quick else (7, 3.0, 2)
    teacher = load_teacher(options.teacher)

    trials = [{batch: bare_rate(teacher, batch, seconds / 5) for batch in BATCHES} for _ in range(3)]
    best = max(BATCHES, key=lambda batch: statistics.median(trial[batch] for trial in trials))
    calls = teacher.solver().nfe
    rates = []
    for _ in range(blocks):
        before, pairs = bare_rate(teacher, best, seconds), pair_rate(teacher, best, best * groups)
        rates.append((before, pairs, bare_rate(teacher, best, seconds)))
    ratios = [pairs * calls / ((before + after) / 2) for before, pairs, after in rates]
    report = {
        "benchmark": "pairs",
        "what": (
            "pairs/s of `d2o pairs` to disk times calls per pair, over calls/s of the bare network at its best batch"
            " size"
        ),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "target": 0.85,
        "baseline": "teacher.network(x, sigma, labels) in torch.inference_mode()",
        "pairs_per_s": round(statistics.median(pairs for _, pairs, _ in rates), 1),
        "bare_calls_per_s": round(statistics.median(rate for before, _, after in rates for rate in (before, after))),
        "calls_per_pair": calls,
        "batch": best,
        "read_pairs_per_s": round(read_rate(1024, 256)),
        "stream_pairs_per_s": round(stream_rate(8192 if options.quick else 65536, 256)),
        "teacher": options.teacher,
        "hardware": hardware(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
