"""E-LatentLPIPS over pixel LPIPS through Stable Diffusion's decoder: seconds and peak memory of the loss of a batch of
latents and its gradient in them, as ratios, and the augmentations' share.

    python benchmarks/latent_lpips.py [--size 64] [--batch 1] [--rounds 5] [--kinds bgco] [--device cuda] [--out FILE]

Baseline, in the same process: LPIPS (VGG-16, at the images' own size) between the decoded latents and target images
that are there already, as a training would store them. The decoder is diffusers' AutoencoderKL at Stable Diffusion's
configuration; latents are 4 x size x size, images 8 times as large: 64 is 512 px. Weights are random: the cost does not
depend on them. Everything in float32. Rounds of the sides alternate; medians of the ratios of neighbours are reported.
Kang et al. 2024 (figure 4, one A100, an image): 117 ms and 15.0 GB over 12.1 ms and 0.6 GB. Targets: 9.7 times as fast,
15 times less memory.
Memory includes a side's weights. On CUDA: its peak beyond what is held before; on a CPU: that of a process of its own,
beyond its imports. Smaller sizes show whether it works, not how fast, and write no file unless --out is given.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2o.augment import latent
from d2o.evaluation.protocol import hardware
from d2o.features.lpips import untrained_lpips
from d2o.interop import torchvision_compat
from d2o.interop.safetensors_io import atomic_write
from d2o.losses.latent_lpips import ELatentLPIPS, load_latent_lpips
from d2o.losses.perceptual import load_lpips
from d2o.networks.latent_vgg import TunedVGG
from d2o.spaces.base import LatentSpace
from d2o.spaces.load import SPACES

RESULTS = Path(__file__).parent / "results"
OURS, BASELINE = "E-LatentLPIPS", "LPIPS through the decoder"
REPEATS = 5
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""Stable Diffusion's autoencoder; its encoder takes no part and is dropped."""
PAPER = {"ms": [12.1, 117.0], "gb": [0.6, 15.0], "times_as_fast": 9.7, "times_less_memory": 25}
TIME_TARGET, MEMORY_TARGET = 9.7, 15.0

Loss = Callable[[Tensor], Tensor]
Options = argparse.Namespace


def make_files(folder: Path) -> None:
    """Random weights of both networks, in files as they are published."""
    torch.manual_seed(0)
    torch.save(TunedVGG(4).state_dict(), folder / "latent.pth")
    with torch.device("meta"):
        shapes = untrained_lpips("vgg").net.state_dict()
    trunk = {f"features.{name.partition('.')[2]}": 0.05 * torch.randn(value.shape) for name, value in shapes.items()}
    torch.save(trunk, folder / "vgg.pth")


def make_ours(options: Options, folder: Path) -> tuple[dict[str, Loss], int]:
    """E-LatentLPIPS of latents and its parts, and the bytes of its weights."""
    distance = load_latent_lpips("sd15", folder / "latent.pth", device=options.device)
    loss, b = ELatentLPIPS(distance, options.kinds), latents(options)

    def augmentations(a: Tensor) -> Tensor:
        draws = latent.draws_from_torch(options.kinds, len(a), a.device)
        return latent.augment_together([a, b], options.kinds, draws)[0].flatten(1).sum(1)

    losses = {OURS: lambda a: loss(a, b), "LatentLPIPS": lambda a: distance(a, b), "augmentations": augmentations}
    return losses, held(loss)


def make_baseline(options: Options, folder: Path) -> tuple[dict[str, Loss], int]:
    torchvision_compat.ensure()
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**VAE)
    del vae.encoder, vae.quant_conv
    space = LatentSpace("sd15", SPACES["sd15"], lambda: vae, options.device)
    lpips = load_lpips(options.device, "vgg", weights=folder / "vgg.pth")
    images = torch.rand(options.batch, 3, 8 * options.size, 8 * options.size, device=options.device) * 2 - 1
    return {BASELINE: lambda a: lpips(space.pixels(a), images)}, held(lpips) + held(space.autoencoder)


MAKERS = {OURS: make_ours, BASELINE: make_baseline}


def held(module: torch.nn.Module) -> int:
    """Bytes of its weights."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def latents(options: Options) -> Tensor:
    return torch.randn(options.batch, 4, options.size, options.size, device=options.device)


def seconds(loss: Loss, options: Options) -> float:
    """Of the loss of new latents and its gradient."""
    a = latents(options).requires_grad_()
    start = now(options)
    loss(a).sum().backward()
    return now(options) - start


def now(options: Options) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def speed(losses: dict[str, Loss], options: Options) -> dict[str, Any]:
    """Rounds of all in turn, the baseline once and the short ones several times in each; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(options.rounds + 1):
        for name, loss in losses.items():
            spent = statistics.median(seconds(loss, options) for _ in range(1 if name == BASELINE else REPEATS))
            found[name] += [spent] if turn else []
    ratios = sorted(theirs / ours for ours, theirs in zip(found[OURS], found[BASELINE], strict=True))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "times_as_fast": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "target": TIME_TARGET,
        "ms_per_latent": {name: round(1000 * s / options.batch, 2) for name, s in medians.items()},
        "share_of_augmentations": round(medians["augmentations"] / medians[OURS], 4),
    }


def memory(weights: dict[str, int], losses: dict[str, Loss], options: Options, folder: Path) -> dict[str, Any]:
    """Peaks of both sides, weights included."""
    peaks = {}
    for name in MAKERS:
        if options.device == "cuda":
            peaks[name] = beyond(losses[name], options) + weights[name]
        else:
            asked = {**vars(options), "out": None, "side": name, "folder": str(folder)}
            words = [sys.executable, __file__, "--child", json.dumps(asked)]
            peaks[name] = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])
    return {
        "times_less": round(peaks[BASELINE] / peaks[OURS], 2),
        "times_less_without_weights": round(
            (peaks[BASELINE] - weights[BASELINE]) / max(peaks[OURS] - weights[OURS], 1), 2
        ),
        "target": MEMORY_TARGET,
        "mb": {name: round(size / 2**20, 1) for name, size in peaks.items()},
        "mb_of_weights": {name: round(size / 2**20, 1) for name, size in weights.items()},
    }


def beyond(loss: Loss, options: Options) -> int:
    """Bytes at the peak beyond those that are held already, on CUDA."""
    seconds(loss, options)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds(loss, options)
    return torch.cuda.max_memory_allocated() - before


def child(options: Options, side: str, folder: Path) -> None:
    """Prints the bytes at the peak beyond the imports, of a process of its own."""
    torchvision_compat.ensure()
    for module in ("diffusers.models.autoencoders.autoencoder_kl", "lpips"):
        importlib.import_module(module)
    torch.nn.functional.conv2d(torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 3, 3)).sum()  # kernels, threads
    before = resident("VmRSS")
    losses, _ = MAKERS[side](options, folder)
    seconds(losses[side], options)
    print(resident("VmHWM") - before)


def resident(line: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="rows and columns of the latents; at least 4 (32 px)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default="bgco", help="augmentations")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default at size 64: benchmarks/results/latent_lpips.json (-cuda)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of torchvision's arguments, which are lpips'
    if options.child:
        asked = json.loads(options.child)
        child(Options(**asked), asked["side"], Path(asked["folder"]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        losses, weights = {}, {}
        for side, make in MAKERS.items():
            made, weights[side] = make(options, folder)
            losses |= made
        report = {
            "benchmark": "latent_lpips",
            "what": f"{OURS} with {options.kinds} over {BASELINE}: loss of a batch and its gradient in the latents",
            "latents": [options.batch, 4, options.size, options.size],
            "pixels": 8 * options.size,
            "speed": speed(losses, options),
            "memory": memory(weights, losses, options, folder),
            "paper": PAPER,
            "hardware": hardware(options.device),
            "date": datetime.date.today().isoformat(),
        }
    text = json.dumps(report, indent=1)
    print(text)
    suffix = "" if options.device == "cpu" else "-cuda"
    out = options.out or (RESULTS / f"latent_lpips{suffix}.json" if options.size == 64 else None)
    if out is not None:
        atomic_write(out, text + "\n")


if __name__ == "__main__":
    main()
