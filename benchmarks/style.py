"""Milliseconds an image of SPI-GAN at 32 px, over one call of EDM's U-Net and over DD-GAN's four, all at their
published sizes; and where an iteration of SPI-GAN's training spends its time.

    python benchmarks/style.py [--quick]

The paper has 0.04 against 0.21 (DD-GAN; seconds, units and batch not stated): a ratio of 0.19. Networks are untrained,
which costs the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from d2o.augment.ada import AdaPipeline, numbers
from d2o.evaluation.protocol import hardware
from d2o.losses.adversarial import critic_loss, generator_loss, r1_penalty
from d2o.networks.build import build_network
from d2o.students.base import Student
from d2o.students.multistep import MultistepStudent
from d2o.students.style import StyleStudent
from d2o.teachers.base import Spec

PAPER = {"SPI-GAN": 0.04, "DD-GAN, K=4": 0.21}
SPEC = Spec("benchmark", (3, 32, 32))
GENERATOR = {"arch": "style_generator", "img_resolution": 32, "img_channels": 3, "synthesis": {"base": 32768}}
CRITIC = {"arch": "style_critic", "img_resolution": 32, "img_channels": 3, "blocks": "orig", "base": 32768}
DDGAN = {
    "arch": "ddgan",
    "img_resolution": 32,
    "img_channels": 3,
    "nf": 128,
    "channel_mult": (1, 2, 2, 2),
    "nz": 100,
    "zdim": 256,
    "n_mlp": 4,
}
EDM = {
    "arch": "ddpmpp",
    "img_resolution": 32,
    "img_channels": 3,
    "label_dim": 0,
    "augment_dim": 9,
    "channel_mult": (2, 2, 2),
}


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of several calls, after one to warm up."""
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def sampling(batch: int, rounds: int, device: str) -> dict[str, Any]:
    students = {
        "SPI-GAN": StyleStudent(build_network(dict(GENERATOR)), SPEC),
        "DD-GAN, K=4": MultistepStudent(build_network(dict(DDGAN)), SPEC, 4),
        "EDM U-Net, one call": Student(build_network(dict(EDM)), SPEC),
    }
    noise, found = torch.randn(batch, 3, 32, 32, device=device), {}
    with torch.inference_mode():
        for name, student in students.items():
            student = student.to(device).eval()
            found[name] = 1000 * seconds(lambda s=student: s(noise), rounds) / batch
    return {
        "batch": batch,
        "ms_per_image": {name: round(ms, 3) for name, ms in found.items()},
        "parameters": {name: sum(p.numel() for p in s.parameters()) for name, s in students.items()},
        "over_dd_gan": round(found["SPI-GAN"] / found["DD-GAN, K=4"], 3),
        "paper_over_dd_gan": round(PAPER["SPI-GAN"] / PAPER["DD-GAN, K=4"], 3),
        "over_one_edm_call": round(found["SPI-GAN"] / found["EDM U-Net, one call"], 3),
    }


def training(batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of the parts of one iteration at one time t, K = 1."""
    generator, critic = build_network(dict(GENERATOR)).to(device), build_network(dict(CRITIC)).to(device)
    pipeline, p = AdaPipeline("bgc"), torch.tensor(0.5, device=device)
    x, source = torch.randn(batch, 3, 32, 32, device=device), numbers(batch, torch.Generator(device).manual_seed(0))

    def generate() -> torch.Tensor:
        return generator(z=x)[0]

    def generator_step() -> None:
        generator_loss(critic(pipeline(generate(), p, *source), 1.0)).mean().backward()

    def critic_step() -> None:
        with torch.no_grad():
            fake = generate()
        real, false = (critic(pipeline(images, p, *source), 1.0) for images in (x, fake))
        critic_loss(real, false).mean().backward()

    def r1() -> None:
        r1_penalty(lambda x, _: critic(pipeline(x, p, *source), 1.0), x).mean().backward()

    parts: dict[str, Callable[[], Any]] = {
        "generator step": generator_step,
        "critic step": critic_step,
        "r1 (every 16)": r1,
        "augmentation, forward": lambda: pipeline(x, p, *source),
    }
    found = {name: seconds(part, rounds) for name, part in parts.items()}
    whole = found["generator step"] + found["critic step"] + found["r1 (every 16)"] / 16
    return {
        "batch": batch,
        "seconds": {name: round(s, 4) for name, s in found.items()},
        "images_per_s": round(batch / whole, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller batches")
    quick = parser.parse_args().quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, rounds = (4, 2) if quick else (16, 5) if device == "cpu" else (100, 20)
    record = {
        "benchmark": "style",
        "sampling": sampling(batch, rounds, device),
        "training": training(batch, 2 if quick else 3, device),
        "quick": quick,
        "hardware": hardware(device),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
