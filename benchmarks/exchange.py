"""Replicated players: gradients that leave while the backward pass runs, against one exchange at its end.

    python benchmarks/exchange.py [--processes 2] [--width 128] [--batch 16] [--blocks 7]
                                  [--out benchmarks/results/exchange.json]

A U-Net's forward, backward and update in N processes (gloo on the CPU; NCCL with a GPU for each). The two ways
alternate in blocks of the same processes, and their weights are compared at the end. Prints the median ratio of the
times (below 1: overlapping is faster), with the exchange alone as a share of an iteration, which is the most that can
be hidden. On a quiet machine with at least one core for each process and one for the exchange.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from d2o.evaluation.protocol import hardware
from d2o.networks.build import build_network, count_parameters
from d2o.training.distributed import barrier, process_group
from d2o.training.optim_section import OptimSection
from d2o.training.player import Player
from d2o.training.precision import LossScale
from d2o.training.strategy import Replicate

ITERATIONS = 4


def make(width: int, placed: Replicate) -> Player:
    torch.manual_seed(0)
    shape = {"img_resolution": 16, "img_channels": 3, "channel_mult": [2, 2], "num_blocks": 2, "attn_resolutions": [8]}
    network = build_network({"arch": "ddpmpp", "model_channels": width, "dropout": 0.0, **shape}).to(placed.device)
    return Player("student", network, OptimSection(lr=1e-4), placed)


def iterate(player: Player, x: torch.Tensor, overlap: bool) -> float:
    """Seconds of some iterations; one more goes before them."""
    sigma, scale = torch.ones(len(x), device=x.device), LossScale("fp32")
    for i in range(ITERATIONS + 1):
        if i == 1:
            _wait(x.device)
            start = time.perf_counter()
        player.exchange.expect(overlap)
        (player.network(x, sigma) - x).square().mean().backward()
        player.update(i, 1e-4, scale)
    _wait(x.device)
    return time.perf_counter() - start


def alone(player: Player, x: torch.Tensor) -> float:
    """Seconds of as many exchanges of gradients that are there already."""
    (player.network(x, torch.ones(len(x), device=x.device)) - x).square().mean().backward()
    _wait(x.device)
    start = time.perf_counter()
    for _ in range(ITERATIONS):
        player.exchange.finish()
    _wait(x.device)
    spent = time.perf_counter() - start
    player.network.zero_grad(set_to_none=True)
    return spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def work(width: int, batch: int, blocks: int, out: Path | None) -> None:
    """One of the processes."""
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    with process_group(device) as (rank, world):
        placed = Replicate(device, world)
        early, late = make(width, placed), make(width, placed)
        x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(rank)).to(device)
        ratios, shares = [], []
        for block in range(blocks):
            spent = {}
            for overlap in (True, False) if block % 2 else (False, True):
                barrier(world)
                spent[overlap] = iterate(early if overlap else late, x, overlap)
            ratios.append(spent[True] / spent[False])
            shares.append(alone(late, x) / spent[False])
        if rank == 0:
            report(early.network, late.network, world, ratios, shares, out)


def report(
    early: nn.Module, late: nn.Module, world: int, ratios: list[float], shares: list[float], out: Path | None
) -> None:
    """Print the ratio, and write it where it is asked for."""
    apart = max((a - b).abs().max().item() for a, b in zip(early.parameters(), late.parameters(), strict=True))
    ratio, share = statistics.median(ratios), statistics.median(shares)
    print(
        f"{count_parameters(early) / 1e6:.1f} M parameters, {world} processes: during the backward pass : at its end ="
        f" {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} blocks);"
        f" the exchange alone is {share:.0%} of an iteration; weights differ by {apart:.1e}"
    )
    if out is not None:
        record = {
            "benchmark": "exchange",
            "what": "seconds of an iteration, gradients exchanged during the backward pass over exchanged at its end",
            "ratio": round(ratio, 3),
            "ratios": [round(value, 3) for value in ratios],
            "target": 1.0,
            "exchange_alone": round(share, 3),
            "weights_differ": apart,
            "processes": world,
            "parameters": count_parameters(early),
            "hardware": hardware(next(early.parameters()).device),
            "date": datetime.date.today().isoformat(),
        }
        out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if "RANK" in os.environ:
        return work(asked.width, asked.batch, asked.blocks, asked.out)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": str(asked.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env={**os.environ, **common, "RANK": str(i), "LOCAL_RANK": str(i)}
        )
        for i in range(asked.processes)
    ]
    raise SystemExit(1 if any([process.wait() for process in running]) else 0)


if __name__ == "__main__":
    main()
