"""Peak memory of `d2o pairs` at two sizes of the store: it must not depend on --n.

    python benchmarks/pairs_memory.py [--teacher tiny-sd] [--sizes 1000,10000]

Every size runs as a command of its own (few solver steps: memory does not depend on them), which reports its peak
resident set at the end. Prints JSON with the ratio of the largest store's peak to the smallest's. Target: at most 1.05.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from d2o.evaluation.protocol import hardware

RUN = """
import resource, sys
from d2o.cli.app import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, end.code)
"""


def peak(teacher: str, n: int, folder: Path) -> tuple[int, float]:
    """(bytes, pairs a second) of one run."""
    words = [
        "pairs",
        "--teacher",
        teacher,
        "--n",
        str(n),
        "--out",
        str(folder / str(n)),
        "--steps",
        "2",
        "--shard-size",
        "256",
        "--batch",
        "64",
    ]
    if teacher != "digits":
        prompts = folder / "prompts.txt"
        prompts.write_text("".join(f"a handwritten digit, number {i}\n" for i in range(n)))
        words += ["--prompts", str(prompts), "--cfg", "3", "--dtype", "fp16"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    word, size, code = done.stdout.split()[-3:]
    if word != "peak" or code != "0":
        raise SystemExit(done.stdout + done.stderr)
    return int(size), n / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="tiny-sd")
    parser.add_argument("--sizes", default="1000,10000")
    options = parser.parse_args()
    sizes = [int(word) for word in options.sizes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        runs = {n: peak(options.teacher, n, Path(folder)) for n in sizes}
    report = {
        "benchmark": "pairs_memory",
        "what": "peak resident set of `d2o pairs`: the largest store's over the smallest's",
        "ratio": round(runs[max(sizes)][0] / runs[min(sizes)][0], 3),
        "target": 1.05,
        "peak_mb": {str(n): round(size / 2**20, 1) for n, (size, _) in runs.items()},
        "pairs_per_s": {str(n): round(rate, 1) for n, (_, rate) in runs.items()},
        "teacher": options.teacher,
        "hardware": hardware(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
