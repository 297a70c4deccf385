"""Several d2o processes on one machine: what two workers on one store make in a second over what one makes, and what a
second process costs.

    python benchmarks/workers.py [--quick] [--out benchmarks/results/workers.json]

Workers are processes that wait with everything loaded, so that starting them is not measured; each round has one, two,
and one with a second that waits for its shard. Three ratios, medians over the rounds, printed as JSON:
- `ratio`: pairs/s of two workers on one store over pairs/s of one. Target: 1.0. The stores' bytes are compared, too.
- `beside_idle`: pairs/s of one worker while a second one waits on the same store for its last shard, over pairs/s of
  one alone.
- `alone`: pairs/s of one worker over one whose idle threads spin as OpenMP has it by default: what making way costs
  where nobody needs it.
Beside them stands `spinning`, the first ratio with those spinning threads: what it was.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, BATCH, SHARD = 9, 64, 64
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def work(spin: bool) -> None:
    """A worker: makes the store of each line OUT N SHARD of its input, and answers with a line when it is finished."""
    from d2o.runtime import share_cores

    if not spin:
        share_cores()  # as the command does it, before torch is imported
    from d2o.data.pair_settings import PairSettings
    from d2o.teachers.compute import Compute
    from d2o.teachers.generate import make_pairs
    from d2o.teachers.registry import load_teacher

    teacher = load_teacher("digits")
    teacher.sample(*warm(teacher), steps=2)
    print("ready", flush=True)
    for line in sys.stdin:
        out, n, shard = line.split()
        make_pairs(
            PairSettings("digits", int(n), steps=STEPS, shard_size=int(shard)),
            out,
            compute=Compute(BATCH),
            teacher=teacher,
        )
        print("done", flush=True)


def warm(teacher):  # type: ignore[no-untyped-def]
    import torch

    return torch.randn(BATCH, *teacher.spec.shape), torch.arange(BATCH) % teacher.spec.classes


class Worker:
    def __init__(self, spin: bool):
        environment = {name: value for name, value in os.environ.items() if name not in WAITING}
        command = [sys.executable, __file__, "--work", *(["--spin"] if spin else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.hear("ready")

    def tell(self, out: Path, n: int, shard: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{out} {n} {shard}\n")
        self.process.stdin.flush()

    def hear(self, word: str) -> None:
        assert self.process.stdout is not None
        heard = self.process.stdout.readline().strip()
        if heard != word:
            raise SystemExit(f"a worker ended: {heard!r}")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def rate(workers: list[Worker], out: Path, n: int, shard: int = SHARD) -> float:
    """Pairs a second of all together, until the last one sees that the store is finished."""
    start = time.perf_counter()
    for worker in workers:
        worker.tell(out, n, shard)
    for worker in workers:
        worker.hear("done")
    return n / (time.perf_counter() - start)


def digest(store: Path) -> str:
    """Of all that the store holds (`timing` is about the workers)."""
    whole = hashlib.sha256()
    for path in sorted(path for path in store.iterdir() if path.is_file()):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--out", type=Path, help="also write the result there")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--spin", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.spin)
        return
    rounds, n = (2, 128) if options.quick else (4, 768)
    with tempfile.TemporaryDirectory() as folder:
        one, two, idle, same = [], [], [], True
        pair = [Worker(spin=False), Worker(spin=False)]
        for i in range(rounds):
            place = Path(folder) / str(i)
            one.append(rate(pair[:1], place / "one", n))
            two.append(rate(pair, place / "two", n))
            idle.append(
                rate(pair, place / "idle", n, shard=n)
            )  # one shard: the second worker waits for it all the time
            same &= digest(place / "one") == digest(place / "two")
        for worker in pair:
            worker.end()
        pair = [Worker(spin=True), Worker(spin=True)]
        alone = [rate(pair[:1], Path(folder) / f"alone{i}", n) for i in range(rounds)]
        spinning = rate(pair, Path(folder) / "spinning", n // 2)
        for worker in pair:
            worker.end()

    from d2o.evaluation.protocol import hardware

    ratios = sorted(b / a for a, b in zip(one, two))
    result = {
        "benchmark": "workers",
        "what": "pairs/s of two `d2o pairs` workers on one store over pairs/s of one",
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "target": 1.0,
        "same_bytes": same,
        "beside_idle": round(statistics.median(b / a for a, b in zip(one, idle)), 3),
        "alone": round(statistics.median(one) / statistics.median(alone), 3),
        "spinning": round(spinning / statistics.median(alone), 3),
        "pairs_per_s": {"one": round(statistics.median(one), 1), "two": round(statistics.median(two), 1)},
        "n": n,
        "solver_steps": STEPS,
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
