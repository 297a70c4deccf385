"""Pairs/s of `d2o pairs` on a Stable-Diffusion-type teacher, to disk and all, over diffusers' own pipeline.

    python benchmarks/pairs_sd.py [--quick] [--teacher tiny-sd] [--device cuda --precision bf16 --random sd15]

The baseline is a loop of StableDiffusionPipeline(..., output_type="latent") with its DDIM scheduler, 50 steps, guidance
3, progress bar off, at the batch size at which it is fastest; d2o runs at the batch size at which it is fastest, with
its network compiled (`--compile none`: as it is; compiling takes about a minute before anything is timed). Same
weights, same noises, same prompts; the largest difference of the latents is stated. Blocks of both alternate in one
process, and the median of the ratios of neighbouring blocks is printed as JSON. Target: 1.3 on a CPU with tiny-sd, 1.5
on a GPU at SD 1.5's size in bf16 (`--random sd15`: random weights at that size), where the fraction of the card's
measured matrix rate is printed, too (target: 0.4).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from d2o.condition import Condition
from d2o.data.pair_settings import PairSettings
from d2o.diffusion.noise import noise_for_seeds
from d2o.evaluation.protocol import hardware
from d2o.interop import torchvision_compat
from d2o.interop.assets import asset
from d2o.teachers.base import Teacher
from d2o.teachers.compute import Compute, tune
from d2o.teachers.generate import make_pairs
from d2o.teachers.registry import BUILTIN, load_teacher

STEPS, CFG = 50, 3.0
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' pipeline with the DDIM scheduler that its own configuration gives."""
    torchvision_compat.ensure()
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
    ).to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_latents(pipe: Any, prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
    latents = noise.to(pipe.device, pipe.unet.dtype)
    return pipe(prompts, num_inference_steps=STEPS, guidance_scale=CFG, latents=latents, output_type="latent").images


def their_rate(pipe: Any, prompts: list[str], batch: int, n: int, shape: tuple[int, ...]) -> float:
    """Pairs a second, kept in memory only."""
    start = time.perf_counter()
    for first in range(0, n, batch):
        noise = noise_for_seeds(range(first, first + batch), shape)
        their_latents(pipe, [prompts[(first + i) % len(prompts)] for i in range(batch)], noise).cpu()
    return n / (time.perf_counter() - start)


def our_rate(teacher: Teacher, prompts: Path, compute: Compute, n: int) -> float:
    """Pairs a second, from nothing to a finished store."""
    with tempfile.TemporaryDirectory() as folder:
        settings = PairSettings(
            "bench", n, solver="ddim", steps=STEPS, cfg=CFG, prompts=str(prompts), shard_size=n, dtype="fp16"
        )
        start = time.perf_counter()
        make_pairs(settings, Path(folder) / "pairs", compute=compute, teacher=teacher, device=teacher.device)
        return n / (time.perf_counter() - start)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a large matrix product, as the card really does it."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize(device)
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def flops_per_call(teacher: Teacher) -> float:
    """FLOP of one pass of the network for one sample."""
    from torch.utils.flop_counter import FlopCounterMode

    text = teacher.embed(Condition.of_prompts(["a handwritten seven"]))
    x = torch.randn(1, *teacher.spec.shape, device=teacher.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.denoise(x, 500.0, text.to(teacher.device))
    return float(counter.get_total_flops())


def random_folder(kind: str, folder: Path) -> Path:
    """A pipeline of SD 1.5's size with random weights, and tiny-sd's tokenizer."""
    torchvision_compat.ensure()
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from d2o.teachers.published_configs import SD15_UNET

    if kind != "sd15":
        raise SystemExit(f"--random {kind}: only sd15 is known")
    torch.manual_seed(0)
    source = asset(BUILTIN["tiny-sd"])
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    words = len(tokenizer)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            **special,
        )
    )
    pipe = StableDiffusionPipeline(
        AutoencoderKL(latent_channels=4),
        text,
        tokenizer,
        UNet2DConditionModel.from_config(SD15_UNET),
        DDIMScheduler.from_pretrained(source / "scheduler"),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def best_batch(batches: list[int], rate: Any) -> int:
    rates: dict[int, float] = {}
    for batch in batches:
        try:
            rates[batch] = rate(batch)
        except torch.OutOfMemoryError:
            break
    return max(rates, key=lambda batch: rates[batch])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks")
    parser.add_argument(
        "--teacher", default="tiny-sd", help="tiny-sd, or a diffusers folder of a StableDiffusionPipeline"
    )
    parser.add_argument("--random", help="sd15: random weights at that size instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--compile", default="default", choices=("none", "default", "graphs"))
    parser.add_argument("--batches", default="32,64,128", help="batch sizes to choose from, for both")
    options = parser.parse_args()
    device, batches = torch.device(options.device), [int(word) for word in options.batches.split(",")]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    blocks, seconds = (3, 6.0) if options.quick else (7, 15.0)
    with tempfile.TemporaryDirectory() as place:
        folder = (
            random_folder(options.random, Path(place) / "model")
            if options.random
            else asset(BUILTIN.get(options.teacher, options.teacher))
        )
        prompts = Path(place) / "prompts.txt"
        texts = [f"a handwritten {word}" for word in WORDS]
        prompts.write_text("\n".join(texts) + "\n")
        teacher, pipe = load_teacher(folder, device), pipeline(folder, device, dtype)
        noise = noise_for_seeds(range(8), teacher.spec.shape)
        theirs = their_latents(pipe, texts[:8], noise).float().cpu()
        flops = flops_per_call(teacher)
        compute = {"precision": options.precision, "channels_last": True, "compile": options.compile}
        tune(teacher, compute)
        ours = teacher.sample(noise, texts[:8], "ddim", STEPS, CFG).cpu()

        their_best = best_batch(batches, lambda batch: their_rate(pipe, texts, batch, batch, teacher.spec.shape))
        for batch in batches:  # compile
            our_rate(teacher, prompts, Compute(batch, **compute), batch)
        our_best = best_batch(batches, lambda batch: our_rate(teacher, prompts, Compute(batch, **compute), batch))
        count = max(
            1,
            round(
                seconds
                * their_rate(pipe, texts, their_best, their_best, teacher.spec.shape)
                / max(their_best, our_best)
            ),
        )
        n = count * max(their_best, our_best)
        rates = []
        for _ in range(blocks):
            before = their_rate(pipe, texts, their_best, n, teacher.spec.shape)
            mine = our_rate(teacher, prompts, Compute(our_best, **compute), n)
            rates.append((before, mine, their_rate(pipe, texts, their_best, n, teacher.spec.shape)))
        ratios = [mine / ((before + after) / 2) for before, mine, after in rates]
        pairs = statistics.median(mine for _, mine, _ in rates)
        report = {
            "benchmark": "pairs_sd",
            "what": (
                "pairs/s of `d2o pairs` to disk over a loop of diffusers'"
                " StableDiffusionPipeline(output_type='latent'), each at its best batch"
            ),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
            "target": 1.3 if device.type == "cpu" else 1.5,
            "baseline": f"diffusers' pipeline, DDIM {STEPS} steps, guidance {CFG:g}, {options.precision}",
            "pairs_per_s": round(pairs, 2),
            "diffusers_pairs_per_s": round(
                statistics.median(rate for before, _, after in rates for rate in (before, after)), 2
            ),
            "batch": our_best,
            "diffusers_batch": their_best,
            "pairs_a_block": n,
            "options": compute,
            "max_difference": float((ours - theirs).abs().max()),
            "largest_value": float(theirs.abs().max()),
            "teacher": options.random or options.teacher,
            "hardware": hardware(device),
            "date": datetime.date.today().isoformat(),
        }
        if device.type == "cuda":
            rate = matrix_rate(device, dtype)
            report["matrix_tflops"] = round(rate / 1e12, 1)
            report["fraction_of_matrix_rate"] = round(pairs * 2 * STEPS * flops / rate, 3)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
