"""The main job, end to end: `make demo`. Runs the `d2o` commands below, echoing each; run again, it continues where it
stopped."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

RUNS = Path("runs/demo")
MEASURE = "--n 1500 --metrics fd,prdc --bootstrap 100 --distance-n 128"
# The recipes themselves train on 80,000 and 20,000 images; the scores hardly move after 30,000.
QUICK = f"--set pairs.path={RUNS}/pairs --set threads=auto"
ROWS = ("real", "teacher", "once", "student", "finetuned")

COMMANDS = f"""
d2o pairs --teacher digits --n 3072 --solver heun --steps 18 --out {RUNS}/pairs
d2o train recipes/quickstart.yaml {QUICK} --set images=30000 --out {RUNS}/student --resume
d2o finetune recipes/finetune_digits.yaml --from {RUNS}/student {QUICK} --set images=8000 --out {RUNS}/finetuned \\
  --resume
d2o sample {RUNS}/student --n 1000 --out {RUNS}/samples.zip --grid {RUNS}/samples.png
d2o eval real:digits/a --against real:digits/b {MEASURE} --name 'real halves' --json {RUNS}/real.json
d2o eval digits --against real:digits {MEASURE} --name 'teacher, 35 NFE' --json {RUNS}/teacher.json
d2o eval digits --solver euler --steps 1 --against real:digits {MEASURE} --name 'teacher called once' \\
  --json {RUNS}/once.json
d2o eval {RUNS}/student --against real:digits {MEASURE} --neighbours 3 --name 'student, 1 NFE' \\
  --json {RUNS}/student.json
d2o eval {RUNS}/finetuned --against real:digits {MEASURE} --neighbours 3 --name 'student, finetuned' \\
  --json {RUNS}/finetuned.json
d2o export {RUNS}/student --format onnx --out {RUNS}/student.onnx
d2o export {RUNS}/student --format program --out {RUNS}/student.pt2
d2o eval --compare {" ".join(f"{RUNS}/{name}.json" for name in ROWS)} --run {RUNS}/student \\
  --run {RUNS}/finetuned --report {RUNS}/report.html
"""


def main() -> int:
    start = time.perf_counter()
    for line in COMMANDS.strip().replace("\\\n  ", "").splitlines():
        words = shlex.split(line)
        print(f"\n$ {line}", flush=True)
        began = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", "d2o", *words[1:]]).returncode
        if code:
            print(
                f"demo: `d2o {words[1]}` stopped with exit code {code}; `make demo` continues from here",
                file=sys.stderr,
            )
            return code
        print(f"[{time.perf_counter() - began:.0f} s]", flush=True)
    print(f"\ndemo done in {(time.perf_counter() - start) / 60:.1f} minutes; open {RUNS}/report.html", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
