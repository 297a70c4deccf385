"""How well the builtin text-to-image teacher obeys its prompts: results/tiny_sd.json.

    python tools/tiny_sd.py [--n 1000] [--steps 50] [--teacher tiny-sd]

Samples of "a handwritten zero" ... "a handwritten nine" in equal parts, decoded, averaged to grey 8x8, and read by the
classifier `digits`; at several guidance weights. For the empty prompt: which digits it draws.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from d2o.condition import Condition
from d2o.diffusion.noise import noise_for_seeds
from d2o.features.load import load_features
from d2o.methods.latent_diffusion import classify
from d2o.teachers.registry import load_teacher
from results import made_by

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEED = 5_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--teacher", default="tiny-sd")
    options = parser.parse_args()
    teacher, extractor, by = load_teacher(options.teacher), load_features("digits"), made_by()
    numbers = torch.arange(options.n)

    def read(prompts: list[str], cfg: float) -> torch.Tensor:
        found = []
        for part in numbers.split(100):
            noise = noise_for_seeds((SEED + part).tolist(), teacher.spec.shape)
            asked = Condition.of_prompts([prompts[i % len(prompts)] for i in part.tolist()])
            images = teacher.decode(teacher.sample(noise, asked, "ddim", options.steps, cfg))
            found.append(classify(extractor, images))
        return torch.cat(found)

    prompts = [f"a handwritten {word}" for word in WORDS]
    accuracy = {f"{cfg:g}": float((read(prompts, cfg) == numbers % 10).float().mean()) for cfg in (1.0, 3.0, 7.5)}
    report = {
        "what": "share of samples in which the classifier `digits` sees the digit of the prompt, by guidance weight",
        "accuracy": accuracy,
        "digits_of_the_empty_prompt": read([""], 1.0).bincount(minlength=10).tolist(),
        "n": options.n,
        "steps": options.steps,
        "solver": "ddim",
        "seeds": [SEED, SEED + options.n - 1],
        "teacher": options.teacher,
        "teacher_sha256": teacher.fingerprint,
        **by,
    }
    path = Path(__file__).parents[1] / "results" / "tiny_sd.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
