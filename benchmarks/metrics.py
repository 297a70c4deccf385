"""The metrics of `d2o eval` over the usual tools, on the same features in the same process, and `d2o eval` over the
bare extractor.

    python benchmarks/metrics.py [--quick] [--only frechet,prdc,memory,eval]

frechet: the Fréchet distance of 2048 features over the formula with scipy.linalg.sqrtm. Target: 5 times as fast. The
reference is decomposed in every call; `kept` says what keeping its factor gives on top.
prdc: precision, recall, density and coverage, k = 5, of 10,000 and 10,000 images of 2048 features, over the package
prdc. Target: 3 times as fast, and (memory) in at most a quarter of its peak memory, each in a process of its own: what
it takes beyond the imports, its features included.
eval: images/s of `d2o eval IMAGES --against STATISTICS --metrics fd`, from PNG files to the JSON result, over the
images/s of the extractor alone on a batch that is there already. Target: 0.85.

Repetitions of both sides alternate; the medians of the ratios of neighbours are printed as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import os
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
from torch import Tensor

from d2o.evaluation.protocol import hardware

K = 5


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def summary(rounds: list[tuple[float, float]], target: float) -> dict[str, Any]:
    """Of (ours, theirs) in seconds."""
    ratios = sorted(theirs / ours for ours, theirs in rounds)
    return {
        "times_as_fast": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "target": target,
        "seconds": round(statistics.median(ours for ours, _ in rounds), 3),
        "baseline_seconds": round(statistics.median(theirs for _, theirs in rounds), 3),
    }


def moments(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of n features whose variances fall as those of real ones do: by a factor of 10,000 from first
    to last."""
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.normal(size=(d, d)))[0]
    x = (draw.normal(size=(n, d)) * np.geomspace(1, 1e-2, d)) @ basis.T + 0.3
    return x.mean(0), np.cov(x, rowvar=False)


def frechet(quick: bool) -> dict[str, Any]:
    import scipy.linalg

    from d2o.metrics.frechet import factor, frechet_distance

    d, repeats = (256, 3) if quick else (2048, 5)
    (mu1, sigma1), (mu2, sigma2) = moments(3 * d, d, 0), moments(3 * d, d, 1)

    def usual() -> float:
        root = np.real(scipy.linalg.sqrtm(sigma1 @ sigma2))
        return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root))

    root = factor(sigma2)
    frechet_distance(mu1, sigma1, mu2, sigma2)
    rounds, kept, values = [], [], (0.0, 0.0)
    for _ in range(repeats):
        (ours, a), (theirs, b) = seconds(lambda: frechet_distance(mu1, sigma1, mu2, sigma2)), seconds(usual)
        rounds.append((ours, theirs))
        kept.append((seconds(lambda: frechet_distance(mu1, sigma1, mu2, sigma2, root))[0], theirs))
        values = (a, b)
    return {
        "what": "Fréchet distance over the formula with scipy.linalg.sqrtm",
        "d": d,
        **summary(rounds, 5.0),
        "times_as_fast_with_kept_reference": summary(kept, 5.0)["times_as_fast"],
        "relative_difference": abs(values[0] / values[1] - 1),
        "scipy": scipy.__version__,
    }


def two_sets(quick: bool) -> tuple[Tensor, Tensor]:
    n, d = (1500, 256) if quick else (10_000, 2048)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def ours_prdc(real: Tensor, fake: Tensor) -> dict[str, float]:
    from d2o.metrics.prdc import manifold

    return vars(manifold(real, fake, K, K, inclusive_pr=False))


def their_prdc(real: Tensor, fake: Tensor) -> dict[str, float]:
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):
        return {key: float(value) for key, value in compute_prdc(real.numpy(), fake.numpy(), K).items()}


def prdc(quick: bool) -> dict[str, Any]:
    real, fake = two_sets(quick)
    ours_prdc(real[:500], fake[:500])
    their_prdc(real[:500], fake[:500])
    rounds, values = [], ({}, {})
    for _ in range(3):
        (ours, a), (theirs, b) = seconds(lambda: ours_prdc(real, fake)), seconds(lambda: their_prdc(real, fake))
        rounds.append((ours, theirs))
        values = (a, b)
    return {
        "what": "precision, recall, density, coverage over prdc.compute_prdc",
        "n": len(real),
        "d": real.shape[1],
        "k": K,
        **summary(rounds, 3.0),
        "largest_difference": max(abs(values[0][key] - values[1][key]) for key in values[1]),
        "values": values[0],
    }


def peak() -> int:
    """Bytes: the largest resident set of this process so far."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def memory_of(side: str, quick: bool) -> int:
    """Bytes beyond the imports; runs in a process of its own."""
    function = {"ours": ours_prdc, "theirs": their_prdc}[side]
    warm = torch.randn(50, 8)
    function(warm, warm)  # imports, threads
    before = peak()
    function(*two_sets(quick))
    return peak() - before


def memory(quick: bool) -> dict[str, Any]:
    sizes = {}
    for side in ("ours", "theirs"):
        words = [sys.executable, __file__, "--memory-of", side, *(["--quick"] if quick else [])]
        sizes[side] = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    real, _ = two_sets(quick)
    return {
        "what": "peak memory of precision, recall, density, coverage over that of prdc.compute_prdc, features included",
        "n": len(real),
        "d": real.shape[1],
        "ratio": round(sizes["ours"] / sizes["theirs"], 3),
        "target": 0.25,
        "mb": round(sizes["ours"] / 2**20),
        "baseline_mb": round(sizes["theirs"] / 2**20),
        "features_mb": round(2 * real.nbytes / 2**20),
    }


def eval_command(words: list[str]) -> None:
    from d2o.cli.app import main

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(words)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"d2o {' '.join(words)} ended with {end.code}") from end


def bare_rate(extractor: Any, images: Tensor, duration: float) -> float:
    """Images a second of the extractor alone, on one batch over and over."""
    extractor.features(images)
    calls, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < duration:
        extractor.features(images)
        calls += 1
    return calls * len(images) / spent


def end_to_end(quick: bool) -> dict[str, Any]:
    from d2o.data.images import save_png_bytes
    from d2o.evaluation.named_extractors import load_extractor

    name, batch, size, rounds_, duration = "lite0", 50, 64, 3, 4.0 if quick else 20.0
    extractor = load_extractor(name)
    images = torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    n = math.ceil(bare_rate(extractor, images, 2.0) * duration / batch) * batch
    rates = []
    with tempfile.TemporaryDirectory() as folder, home(Path(folder) / "home"):
        (Path(folder) / "images").mkdir()
        pictures = torch.randint(
            0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        for i, picture in enumerate(pictures):
            (Path(folder) / "images" / f"{i:06d}.png").write_bytes(save_png_bytes(picture))
        np.savez(Path(folder) / "reference.npz", mu=np.zeros(extractor.dim), sigma=np.eye(extractor.dim))
        words = [
            "eval",
            f"{folder}/images",
            "--against",
            f"{folder}/reference.npz",
            "--metrics",
            "fd",
            "--extractor",
            name,
            "--batch",
            str(batch),
            "--device",
            "cpu",
            "--json",
            f"{folder}/result.json",
        ]
        eval_command(words)  # the first one warms up
        for _ in range(rounds_):
            before, (spent, _) = bare_rate(extractor, images, duration / 4), seconds(lambda: eval_command(words))
            rates.append((before, n / spent, bare_rate(extractor, images, duration / 4)))
    ratios = sorted(rate / ((before + after) / 2) for before, rate, after in rates)
    return {
        "what": "images/s of `d2o eval` from PNG files to the result over images/s of the extractor alone",
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "target": 0.85,
        "extractor": name,
        "n": n,
        "batch": batch,
        "pixels": size,
        "images_per_s": round(statistics.median(rate for _, rate, _ in rates), 1),
        "bare_images_per_s": round(
            statistics.median(rate for before, _, after in rates for rate in (before, after)), 1
        ),
    }


@contextlib.contextmanager
def home(folder: Path) -> Any:
    """d2o's own folder, for as long as the block runs."""
    before = os.environ.get("D2O_HOME")
    os.environ["D2O_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("D2O_HOME")
        if before is not None:
            os.environ["D2O_HOME"] = before


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "frechet": frechet,
    "prdc": prdc,
    "memory": memory,
    "eval": end_to_end,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it works, not how fast")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--memory-of", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory_of(options.memory_of, options.quick))
        return
    report = {
        "benchmark": "metrics",
        **{name: PARTS[name](options.quick) for name in options.only.split(",")},
        "quick": options.quick,
        "hardware": hardware(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
