"""Distillation where everything is known: a mixture of Gaussians in the plane, whose denoiser has a closed form, taught
to a small MLP.

    python benchmarks/mixture.py [--quick]

SiD for several alpha, DMD and Diff-Instruct, each by the real method and training loop, from a student and a score
network that are MLPs of two
widths: the wider one can learn the mixture's denoiser well, the narrow one cannot, so that its score is wrong
throughout. Measured along the
training: the energy distance (the squared MMD of the kernel -|x - y|) of 2,000 samples of the student, averaged over
time, to 2,000 of the mixture, beside that of fresh samples of the mixture; and the share of samples near each
component.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from d2o.evaluation.protocol import hardware
from d2o.methods.base import Setup
from d2o.networks.precond import Denoiser
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag
from d2o.teachers.base import Spec, Teacher
from d2o.training.loop import Trainer
from tests.diffusion.mixture import PLANE, Mixture

POINTS = 2000
SPEC = Spec("mixture", (2, 1, 1), value_range=(-8.0, 8.0))
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "sid alpha -0.25": ("sid", {"alpha": -0.25}, 2.5),
    "sid alpha 0": ("sid", {"alpha": 0.0}, 2.5),
    "sid alpha 0.5": ("sid", {"alpha": 0.5}, 2.5),
    "sid alpha 1": ("sid", {"alpha": 1.0}, 2.5),
    "sid alpha 1.2": ("sid", {"alpha": 1.2}, 2.5),
    "sid alpha 1.5": ("sid", {"alpha": 1.5}, 2.5),
    "dmd": ("dmd", {"kind": "dmd"}, 2.5),
    "dmd, 5 score steps": ("dmd", {"kind": "dmd", "score_steps": 5}, 2.5),
    "diff-instruct": ("dmd", {"kind": "diff_instruct"}, 2.5),
}
"""Name -> method, its options, and the noise level at which the student is called."""


class PlaneDenoiser(Denoiser):
    """A preconditioned MLP on points [B, 2, 1, 1]. With `exact` it is that mixture's denoiser instead; copies of it,
    which methods train, are not."""

    def __init__(self, exact: Mixture | None = None, width: int = 64):
        super().__init__(1, 2, 0)
        self.config = {"arch": "plane", "width": width}
        self.frequencies = (0.5, 1.0, 2.0, 4.0)
        sizes = [2 + 2 * len(self.frequencies), width, width]
        layers = [layer for i in range(3) for layer in (nn.Linear(sizes[i], width), nn.SiLU())]
        self.model = nn.Sequential(*layers, nn.Linear(width, 2))
        object.__setattr__(self, "exact", exact)  # no part of the network

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1).expand(len(x), 1, 1, 1)
        if self.exact is not None:
            return self.exact.posterior(x, 1.0, sigma.flatten().double())[0].to(torch.float32)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        angles = c_noise.flatten(1) * torch.tensor(self.frequencies) * 3
        f = self.model(torch.cat([(c_in * x).flatten(1), angles.cos(), angles.sin()], 1))
        return c_skip * x + c_out * f[:, :, None, None]

    def __deepcopy__(self, memo: dict) -> PlaneDenoiser:
        copy = PlaneDenoiser(width=self.config["width"])
        copy.load_state_dict(self.state_dict())
        return copy.train(self.training)


def make_teacher(
    width: int = 64, mixture: Mixture = PLANE, iterations: int = 800, batch: int = 512, seed: int = 0
) -> Teacher:
    """The exact teacher. Its network's copies begin as an MLP that has learnt its denoiser, as EDM trains (with the
    exact images as targets)."""
    torch.manual_seed(seed)
    network = PlaneDenoiser(width=width)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for i in range(iterations):
        x, _ = mixture.sample(batch, 1 + i, (2, 1, 1))
        sigma = (-1.2 + 1.8 * torch.randn(batch, 1, 1, 1)).exp()  # wider than EDM's, as the student's levels are
        x_t = (x + sigma * torch.randn(x.shape)).float()
        exact, _ = mixture.posterior(x_t, 1.0, sigma.flatten().double())
        error = network(x_t, sigma) - exact.float()
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - i / iterations)
        optimiser.zero_grad()
        ((sigma**-2 + 4) * error**2).mean().backward()
        optimiser.step()
    object.__setattr__(network, "exact", mixture)
    return Teacher(network, SPEC)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of points [n, 2] and [m, 2], without bias: MMD^2 with the kernel -|x - y|."""
    within = [torch.cdist(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - within[0] - within[1])


def shares(x: Tensor, mixture: Mixture) -> list[float]:
    """The part of the points [n, 2] that is nearest, by density, to each component."""
    _, away, variance, _ = mixture._components(x, 1.0, 0.0)
    return torch.bincount(mixture._logits(away, variance).argmax(1), minlength=len(mixture.means)).div(len(x)).tolist()


def distil(
    name: str,
    teacher: Teacher,
    images: int,
    folder: Path,
    *,
    every: int,
    batch: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, Any]:
    """Train by the real method and loop; energy distances to the mixture at the start, `every` so many images, and at
    the end."""
    method, options, sigma = METHODS[name]
    network = teacher.network
    assert isinstance(network, PlaneDenoiser) and network.exact is not None
    recipe = Recipe.from_dict(
        {
            "name": "mixture",
            "method": method,
            method: options,
            "student": {"sigma": sigma},
            "batch": batch,
            "images": images,
            "seed": seed,
            "optim": {"lr": lr, "betas": [0.0, 0.999], "schedule": "cosine"},
            "optim_critic": {"lr": lr, "betas": [0.0, 0.999]},
            "ema": {"half_life": 10 * batch},
            "log_every": every // batch,
            "checkpoint": {"every": 10**9, "keep": 0},
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        recipe, Setup(recipe.options, teacher=teacher, student=recipe.student, batch=batch, seed=seed), folder
    )
    noise = torch.randn(POINTS, 2, 1, 1, generator=torch.Generator().manual_seed(7))
    real = network.exact.sample(POINTS, 123, (2,))[0].float()
    curve: list[tuple[int, float]] = []

    def measure(done: int, note: str = "") -> None:
        curve.append((done, energy_distance(trainer.generate(noise, None).flatten(1), real)))

    measure(0)
    start = time.perf_counter()
    trainer.run(measure, StopFlag())
    points = trainer.generate(noise, None).flatten(1)
    return {
        "method": name,
        "images": images,
        "energy": curve[-1][1],
        "shares": shares(points, network.exact),
        "curve": curve,
        "seconds": round(time.perf_counter() - start, 1),
    }


def fresh(mixture: Mixture, sets: int = 20) -> list[float]:
    """The same distance of fresh samples of the mixture: what a perfect student has."""
    real = mixture.sample(POINTS, 123, (2,))[0].float()
    return [energy_distance(mixture.sample(POINTS, 1000 + k, (2,))[0].float(), real) for k in range(sets)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the length")
    parser.add_argument("--only", help="methods whose names begin so")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "mixture.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = 12_800 if arguments.quick else 102_400
    floor = fresh(PLANE)
    print(f"fresh samples of the mixture: mean {sum(floor) / len(floor):.5f}, largest of {len(floor)} {max(floor):.5f}")
    rows = []
    for width in (12, 64):
        teacher = make_teacher(width)
        for name in METHODS:
            if arguments.only and not name.startswith(arguments.only):
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = {"width": width, **distil(name, teacher, images, Path(folder), every=6400)}
            rows.append(row)
            early = "  ".join(f"{done:,}: {energy:.4f}" for done, energy in row["curve"][:4])
            print(
                f"width {width}  {name:18s}  {early}  end: {row['energy']:.4f}  shares"
                f" {[round(s, 2) for s in row['shares']]}",
                flush=True,
            )
    result = {
        "benchmark": "mixture",
        "images": images,
        "fresh": {"mean": sum(floor) / len(floor), "largest": max(floor), "sets": len(floor)},
        "weights": PLANE.logits.softmax(0).tolist(),
        "rows": rows,
        "quick": arguments.quick,
        "hardware": hardware("cpu"),
        "date": datetime.date.today().isoformat(),
    }
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
