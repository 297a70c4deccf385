"""The losses of the first iterations of three recipes, as the version before the rebuild had them.

    python -m tests.previous.baseline                    # all 50 iterations of each against losses.json; minutes
    python tests/previous/baseline.py --write FILE       # this version's, to FILE (PYTHONPATH says which)

Everything is as the recipe says, learning rates' course and all, but that quickstart's pairs are 256 instead of 4,096
(`fixtures/previous/digits_pairs`, made by the previous version), and nothing is evaluated or shown on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

FILES = Path(__file__).parent.parent / "fixtures" / "previous"
LOSSES = FILES / "losses.json"
ITERATIONS = 50
RECIPES = {
    "quickstart": [f"pairs.path={FILES / 'digits_pairs'}", "pairs.n=256"],
    "sid_digits": [],
    "spi_gan_digits": [],
}
CLOSE = 1e-5
"""Relative; of values below 1, absolute: SiD's loss passes through 0."""


class Enough(Exception):
    pass


def processor() -> str:
    """Model and instruction set: elsewhere sums are rounded otherwise, and losses of networks that play against each
    other (SPI-GAN at a rate of 0.01: 0.06 after 10 iterations) soon tell."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def losses(name: str, iterations: int) -> dict[str, list[float]]:
    """What the log says of each of the first iterations: every loss, logit and norm by its name."""
    from d2o.recipes.load import load_recipe
    from d2o.runtime import StopFlag
    from d2o.training.loop import Trainer
    from d2o.training.setup import prepare

    recipe = load_recipe(name, [*RECIPES[name], "log_every=1", "eval=null", "preview=null", "threads=1"])
    last = min(iterations * recipe.batch, recipe.images)

    def watch(images: int, note: str) -> None:
        if images >= last:
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(recipe, torch.device("cpu"), None, lambda line: None, lambda *_: None, StopFlag())
        with contextlib.suppress(Enough):
            Trainer(recipe, setup, Path(folder)).run(watch, StopFlag())
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    left_out = ("iteration", "images", "lr", "images_per_s", "watch", "gap")
    keys = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in left_out]
    return {key: [line.get(key) for line in lines[:iterations]] for key in keys}


def differences(found: dict[str, list[float]], expected: dict[str, list[float]], iterations: int) -> dict[str, float]:
    """The largest difference of each scalar, in units of `CLOSE`."""
    result = {}
    for key, values in expected.items():
        pairs = list(zip(found[key][:iterations], values[:iterations], strict=True))
        assert all((a is None) == (b is None) for a, b in pairs), key
        known = [(a, b) for a, b in pairs if b is not None]
        assert all(math.isfinite(a) for a, _ in known)
        result[key] = max((abs(a - b) / max(1.0, abs(b)) / CLOSE for a, b in known), default=0.0)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--write", type=Path, help="write them to this file, compare with nothing")
    options = parser.parse_args()
    found = {name: losses(name, options.iterations) for name in options.recipes}
    if options.write:
        options.write.write_text(
            json.dumps({"processor": processor(), **found}).replace("], ", "],\n ").replace("}, ", "},\n") + "\n"
        )
        return 0
    known, worst = json.loads(LOSSES.read_text()), 0.0
    print(f"made on {known['processor']}; this is {processor()}")
    for name in options.recipes:
        apart = differences(found[name], known[name], options.iterations)
        worst = max(worst, *apart.values())
        print(name, {key: f"{value * CLOSE:.1e}" for key, value in apart.items()})
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
