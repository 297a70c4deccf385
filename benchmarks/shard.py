"""Strategy `shard`: do several processes end with the weights of one, and how much memory does each need?

    python benchmarks/shard.py equal [--processes 2 4] [--only NAME]   every method's digits recipe, 20 iterations
    python benchmarks/shard.py memory [--millions 200]                 peak of each of 2 processes, shard : replicate

`equal` trains the recipes' `--mini` with SGD-like settings of Adam (a large eps), as Adam makes whole steps of the
rounding errors of gradients that are 0, whatever the strategy; beside the largest difference it prints how far training
has moved the weights. Exits with 1 if a difference is above 1e-5. Nothing here measures time: it may run beside others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ITERATIONS, LIMIT = 20, 1e-5
RECIPES: dict[str, list[str]] = {
    "quickstart": [],
    "sid_digits": [],
    "sida_digits": ["sid.batch_pool=4", "sid.start_g_nimg=0", "sid.start_adv_nimg=256"],
    "dmd_digits": [],
    "diff_instruct_digits": [],
    "cd_digits": [],
    "pd_digits": [],
    "ctm_digits": [],
    "dd_gan_digits": [],
    "spi_gan_digits": ["spi_gan.critic.mbstd_group=0"],  # a group is of samples that a process has
    "teacher_digits": ["network.dropout=0.0"],  # masks are drawn by process
    "classifier_digits": ["network.dropout=0.0"],
    "tiny_sd_vae": [],
    "tiny_sd": [],
}
"""Recipe -> what makes it the same for any number of processes: pools that fit a share of 4, no dropout."""


def changes(recipe: str, strategy: str) -> list[str]:
    quiet = ["threads=1", "eval=null", "preview=null", "channels_last=false", "checkpoint.keep=0", "log_every=20"]
    calm = ["optim.eps=0.01"] + (["optim_critic.eps=0.01"] if recipe in ("dmd_digits", "diff_instruct_digits") else [])
    return [*quiet, *calm, *RECIPES[recipe], f"strategy={strategy}"]


def train(out: Path, recipes: list[str], strategy: str) -> None:
    """One of the processes."""
    import torch

    import d2o.critics.dd_gan as ddgan_critic
    from d2o.interop.safetensors_io import save_file
    from d2o.recipes.load import load_recipe
    from d2o.runtime import StopFlag
    from d2o.training.distributed import process_group
    from d2o.training.loop import Trainer
    from d2o.training.setup import prepare

    ddgan_critic.GROUP = 1  # as for SPI-GAN
    device = torch.device("cpu")
    with process_group(device) as (rank, world):
        for name in recipes:
            batch = load_recipe(name, mini=True).batch
            recipe = load_recipe(name, [*changes(name, strategy), f"images={ITERATIONS * batch}"], mini=True)
            setup = prepare(recipe, device, None, lambda _: None, lambda *_: None, StopFlag())
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            trainer = Trainer(recipe, setup, folder, rank, world)
            if world == 1:
                first = {key: value.clone() for key, value in trainer.product.network.state_dict().items()}
                save_file(folder / "first.safetensors", first, {})
            trainer.run(lambda done, note: None, StopFlag())
            if rank == 0:
                print(f"{name}: {world} processes, {strategy}", file=sys.stderr, flush=True)


def equal(processes: list[int], recipes: list[str]) -> bool:
    from d2o.interop.safetensors_io import load_file

    good, product = True, "checkpoints/last.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        runs = {(1, "replicate"): Path(folder) / "one"}
        runs |= {(n, s): Path(folder) / f"{s}{n}" for n in processes for s in ("replicate", "shard")}
        for (n, strategy), out in runs.items():
            launch(n, ["train", str(out), strategy, *recipes])
        print(f"{'recipe':<24}{'moved':>10}" + "".join(f"{f'{n} {s}':>14}" for n, s in list(runs)[1:]))
        for name in recipes:
            found = {key: load_file(out / name / product)[0] for key, out in runs.items()}
            first = load_file(runs[1, "replicate"] / name / "first.safetensors")[0]
            one = found.pop((1, "replicate"))
            start = {key: first.get(key, first.get(f"network.{key}")) for key in one}
            moved = difference(one, {key: value for key, value in start.items() if value is not None})
            apart = [difference(one, other) for other in found.values()]
            good = good and max(apart) <= LIMIT
            print(f"{name:<24}{moved:>10.1e}" + "".join(f"{value:>14.1e}" for value in apart), flush=True)
    return good


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max((a[key].float() - b[key].float()).abs().max().item() for key in b)


def player(strategy: str, millions: int, out: Path) -> None:
    """One of the processes: some iterations of a U-Net of so many parameters, then its peak of memory."""
    import torch

    from d2o.networks.build import build_network, count_parameters
    from d2o.training.distributed import process_group
    from d2o.training.ema_section import EmaSection
    from d2o.training.optim_section import OptimSection
    from d2o.training.player import Player
    from d2o.training.precision import LossScale
    from d2o.training.strategy import Replicate, Shard

    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as (rank, world):
        shape: dict[str, Any] = {"img_resolution": 8, "img_channels": 3, "channel_mult": [2, 2], "num_blocks": 4}
        width = 32 * round(9.3 * (millions / 200) ** 0.5)  # a multiple of the groups of its norms
        network = build_network({"arch": "ddpmpp", "model_channels": width, "attn_resolutions": [8], **shape})
        placed = (Shard if strategy == "shard" else Replicate)(torch.device("cpu"), world)
        trained = Player("student", network, OptimSection(lr=1e-4), placed, average=EmaSection(half_life=1000))
        built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        x, sigma = torch.randn(1, 3, 8, 8), torch.ones(1)
        for i in range(3):
            trained.exchange.expect(True)
            (network(x, sigma) ** 2).mean().backward()
            placed.after_backward()
            trained.update(i, 1e-4, LossScale("fp32"))
            assert trained.ema is not None
            trained.ema.update(network, i, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        numbers = count_parameters(network)
        (out / f"{strategy}{rank}.json").write_text(json.dumps({"built": built, "peak": peak, "parameters": numbers}))


def memory(millions: int) -> bool:
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for strategy in ("replicate", "shard"):
            launch(2, ["player", strategy, str(millions), folder])
            found = [json.loads((Path(folder) / f"{strategy}{rank}.json").read_text()) for rank in range(2)]
            peaks[strategy] = max(one["peak"] for one in found)
            built = max(one["built"] for one in found)
            print(
                f"{strategy:<10}{found[0]['parameters'] / 1e6:>7.0f} M parameters, peak of a process"
                f" {peaks[strategy] / 2**20:.2f} GiB, when it was built {built / 2**20:.2f} GiB",
                flush=True,
            )
    ratio = peaks["shard"] / peaks["replicate"]
    print(f"shard : replicate = {ratio:.2f} (asked: at most 0.65)")
    return ratio <= 0.65


RETURNED = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""So that glibc gives freed memory back at once: the peak is then what was asked for, not how it was cut up."""


def launch(processes: int, arguments: list[str]) -> None:
    """This file as so many processes; SystemExit where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, **RETURNED, **common, "RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(processes)
    ]
    if any([process.wait() for process in running]):
        raise SystemExit(f"{' '.join(arguments)} failed with {processes} processes")


def main() -> None:
    inner = {"train": lambda a: train(Path(a[0]), a[2:], a[1]), "player": lambda a: player(a[0], int(a[1]), Path(a[2]))}
    if len(sys.argv) > 1 and sys.argv[1] in inner:
        return inner[sys.argv[1]](sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("equal", "memory"))
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", nargs="+", default=list(RECIPES))
    parser.add_argument("--millions", type=int, default=200)
    asked = parser.parse_args()
    raise SystemExit(
        0 if (equal(asked.processes, asked.only) if asked.what == "equal" else memory(asked.millions)) else 1
    )


if __name__ == "__main__":
    main()
