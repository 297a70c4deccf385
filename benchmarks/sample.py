"""Images/s of `d2o sample --out x.zip`, from noise to the finished file, over the images/s of the bare student.

    python benchmarks/sample.py [CHECKPOINT] [--quick]

The baseline calls the student in a loop on noise that is there already, in inference mode, at the same batch size and
threads, and keeps nothing. Sampling draws noise, computes, encodes PNGs, writes parts and joins them. Both run in the
same process; blocks of both alternate, and the median of the ratios of neighbouring blocks is printed as JSON. Without
a checkpoint the student is the network of the teacher `digits`. Target: 0.85.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from d2o.evaluation.protocol import hardware
from d2o.students.base import Student, load_student
from d2o.students.generate import SampleSettings, make_samples
from d2o.students.samplers import student_sampler
from d2o.teachers.registry import load_teacher


def bare_rate(student: Student, batch: int, seconds: float) -> float:
    """Images a second."""
    noise, labels, calls = torch.randn(batch, *student.spec.shape), torch.arange(batch) % student.spec.classes, 0
    with torch.inference_mode():
        student(noise, labels)
        start = time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            student(noise, labels)
            calls += 1
    return calls * batch / spent


def sample_rate(student: Student, batch: int, n: int, suffix: str) -> float:
    """Images a second, from nothing to the finished file."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make_samples(student_sampler(student), Path(folder) / f"x{suffix}", SampleSettings(n), batch=batch)
        return n / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", help="a student's .safetensors")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--suffix", default=".zip", help=".zip, .tar, .npz or nothing for a folder")
    options = parser.parse_args()
    blocks, seconds = (3, 2.0) if options.quick else (9, 4.0)
    if options.checkpoint:
        student = load_student(options.checkpoint)
    else:
        teacher = load_teacher("digits")
        student = Student(teacher.network, teacher.spec).eval()

    n = int(bare_rate(student, options.batch, seconds) * seconds)
    rates = []
    for _ in range(blocks):
        before, images = (
            bare_rate(student, options.batch, seconds),
            sample_rate(student, options.batch, n, options.suffix),
        )
        rates.append((before, images, bare_rate(student, options.batch, seconds)))
    ratios = [images / ((before + after) / 2) for before, images, after in rates]
    report = {
        "benchmark": "sample",
        "what": f"images/s of `d2o sample` to x{options.suffix} over images/s of the bare student",
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "target": 0.85,
        "baseline": "student(noise, labels) in torch.inference_mode()",
        "images_per_s": round(statistics.median(images for _, images, _ in rates)),
        "bare_images_per_s": round(statistics.median(rate for before, _, after in rates for rate in (before, after))),
        "batch": options.batch,
        "n": n,
        "student": Path(options.checkpoint).name if options.checkpoint else "the network of teacher digits",
        "hardware": hardware(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
