"""Strategy `shard`: do several processes end with the weights of one, and how much memory does each need?

    python benchmarks/shard.py equal [--processes 2 4] [--only NAME] [--eps calm double] [--strategies shard]
                                      [--out benchmarks/results/shard.json]
    python benchmarks/shard.py memory [--millions 200] [--out benchmarks/results/shard_memory.json]
                                                            peak of each of 2 processes, shard : replicate

`equal` trains each method's digits recipe (`--mini`), 20 iterations, and compares the products; what `--out` has of
other runs stays there, and nudged ones are not made again. Stage 2 of Diffusion2GAN begins from the teacher here. Adam
divides a gradient by its own size: where that is nothing but rounding errors it makes whole steps of them, whatever the
strategy. So every run is done twice: "calm", with an eps of 0.01, and "own", with the recipe's eps, which also one
process does in two micro-batches. Calm runs have beside them one process that begins with weights 1e-7 of themselves
away ("nudged"): what training itself makes of rounding errors, and networks against each other make much. A calm
difference above 1e-5 that is more than NUDGED times that one is a fault (exits with 1). "double": calm runs in double
precision, where rounding errors are 1e-16: there nothing may differ by 1e-5, however much a training makes of them.
`moved`: how far training has moved the weights; `above`: share of the numbers that differ by more than 1e-5. Nothing
here measures time: it may run beside others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe

ITERATIONS, LIMIT, NUDGED, MEMORY, PRODUCT = 20, 1e-5, 2, 0.65, "checkpoints/last.safetensors"
GENTLE = ["optim.lr=1e-4", "optim.final_lr=1e-5", "optim_critic.lr=1e-4", "optim_critic.final_lr=1e-5"]
POOLS = ["network.dropout=0.0", "latent_classifier.pool=16"]
PAIRS = f"pairs.path={tempfile.gettempdir()}/d2o_shard_pairs"
RECIPES: dict[str, list[str]] = {
    "quickstart": ["pairs.n=256", PAIRS],
    "sid_digits": [],
    "sida_digits": ["sid.batch_pool=4", "sid.start_g_nimg=0", "sid.start_adv_nimg=256"],
    "dmd_digits": [],
    "dmd_digits:dmd2": [],
    "diff_instruct_digits": [],
    "cd_digits": [],
    "pd_digits": [],
    "ctm_digits": [],
    "dd_gan_digits": [],
    "spi_gan_digits": [],
    "gdd_digits": ["gdd.r1.interval=4"],
    "gdd_digits:gdd_i": ["gdd.r1.interval=4", "student.steps=2"],
    "teacher_digits": ["network.dropout=0.0"],  # masks are drawn by process
    "classifier_digits": ["network.dropout=0.0"],
    "spi_gan_digits, 1 iteration": ["images=32"],
    "spi_gan_digits, lr 1e-4": [*GENTLE, "spi_gan.pl_weight=1.0", "spi_gan.mixing_prob=0.5"],
    "tiny_sd_vae": [],
    "tiny_sd": [],
    "d2g_digits": [f"{PAIRS}_d2g"],
    "d2g_digits:gan": [f"{PAIRS}_d2g"],
    "d2g_tiny_sd": [f"{PAIRS}_sd"],
    "d2g_tiny_sd:gan": [f"{PAIRS}_sd"],
    "latent_classifier": POOLS,
    "latent_classifier, 1 iteration": [*POOLS, "images=64"],
    "latent_lpips": ["batch=48"],
}
"""Recipe (what comes after a comma tells rows of one apart) -> what makes it the same for any number of processes:
pools that fit a share of 4, no dropout. SPI-GAN at its learning rate of 0.01 and the classifier with batch
normalisation make much of rounding errors within 20 iterations. So they are shown after one too, and SPI-GAN at a rate
of 1e-4 with all of its regularisers."""


def settings_of(name: str, eps: str, how: str) -> Recipe:
    """A row's recipe, for one of its runs."""
    from d2o.recipes.load import load_recipe

    recipe = name.partition(",")[0]
    own = load_recipe(recipe, RECIPES[name], mini=True)
    quiet = ["threads=1", "eval=null", "preview=null", "channels_last=false", "checkpoint.keep=0", "log_every=20"]
    calm = ["optim.eps=0.01", *(["optim_critic.eps=0.01"] if own.optim_critic else [])] if eps != "own" else []
    parts = [f"micro_batch={own.batch // 2}"] if how == "micro" else []
    strategy = f"strategy={'shard' if how == 'shard' else 'replicate'}"
    length = f"images={ITERATIONS * own.batch}"
    own_pairs = [f"{change}_double" for change in RECIPES[name] if change.startswith(PAIRS) and eps == "double"]
    return load_recipe(recipe, [*quiet, *calm, *parts, strategy, length, *RECIPES[name], *own_pairs], mini=True)


def train(out: Path, eps: str, how: str, recipes: list[str]) -> None:
    """One of the processes."""
    import torch

    if eps == "double":
        in_double()
    from d2o.errors import UserError
    from d2o.interop.safetensors_io import save_file
    from d2o.runtime import StopFlag
    from d2o.training.distributed import process_group
    from d2o.training.loop import Trainer
    from d2o.training.setup import prepare

    device = torch.device("cpu")
    with process_group(device) as (rank, world):
        for name in recipes:
            recipe = settings_of(name, eps, how)
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            try:
                setup = prepare(recipe, device, None, lambda _: None, lambda *_: None, StopFlag())
                trainer = Trainer(recipe, setup, folder, rank, world)
            except UserError as refused:
                (folder / "refused.txt").write_text(refused.message)
                continue
            if world == 1:
                first = {key: value.clone() for key, value in trainer.product.network.state_dict().items()}
                save_file(folder / "first.safetensors", first, {})
            if how == "nudged":
                torch.manual_seed(1)
                for weights in (p.data for one in trainer.players.values() for p in one.parameters.values()):
                    weights.mul_(1 + 1e-7 * torch.randn_like(weights))
            trainer.run(lambda done, note: None, StopFlag())
            if rank == 0:
                print(f"{name}: {eps}, {world} processes, {how}", file=sys.stderr, flush=True)


def in_double() -> None:
    """From now on, whatever asks for single precision gets double. Files are read as they are."""
    import torch

    from d2o.interop import safetensors_io

    single, double, load = torch.float32, torch.float64, safetensors_io.load_file

    def loaded(*arguments: Any, **more: Any) -> Any:
        torch.float32 = single
        try:
            tensors, meta = load(*arguments, **more)
        finally:
            torch.float32 = double
        return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}, meta

    safetensors_io.load_file = loaded
    torch.float32 = double
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(double)


def equal(
    processes: list[int], recipes: list[str], strategies: list[str], settings: list[str], out: Path | None
) -> bool:
    from d2o.evaluation.protocol import hardware
    from d2o.interop.safetensors_io import load_file

    head = {"iterations": ITERATIONS, "limit": LIMIT, "hardware": hardware(), "date": datetime.date.today().isoformat()}
    table: dict[str, dict[str, Any]] = {}  # of what was measured before, the rest stays
    if out is not None and out.exists():
        table = json.loads(out.read_text())["recipes"]
    table |= {name: table.get(name, {}) for name in recipes}
    shared = [(n, how) for n in processes for how in strategies]
    with tempfile.TemporaryDirectory() as folder:
        for eps in settings:
            runs = [*{"own": [(1, "micro")], "calm": [(1, "nudged")], "double": []}[eps], *shared]
            alone = Path(folder) / f"{eps}_one"
            launch(1, ["train", str(alone), eps, "one", *recipes])
            for n, how in runs:
                place = Path(folder) / f"{eps}_{how}{n}"
                left = [name for name in recipes if how != "nudged" or f"{eps}, {n} {how}" not in table[name]]
                if left:
                    launch(n, ["train", str(place), eps, how, *left])
                for name in left:
                    if (refused := place / name / "refused.txt").exists():
                        table[name][f"{eps}, {n} {how}"] = refused.read_text()
                        continue
                    one, other = (load_file(run / name / PRODUCT)[0] for run in (alone, place))
                    first = load_file(alone / name / "first.safetensors")[0]
                    start = {key: first.get(key, first.get(f"network.{key}")) for key in one}
                    table[name][f"{eps}, moved"] = compare(one, {k: v for k, v in start.items() if v is not None})[0]
                    most, above = compare(one, other)
                    table[name][f"{eps}, {n} {how}"] = {"largest": most, "above": above}
                    print(f"{name:<29}{eps:>6}{n:>3} {how:<10}{most:>10.1e}{above:>10.1e}", flush=True)
                if out is not None:
                    out.write_text(json.dumps({**head, "recipes": table}, indent=1) + "\n")
    faults = []
    for name in recipes:
        nudged = NUDGED * table[name].get("calm, 1 nudged", {"largest": 0})["largest"]
        for eps, limit in (("calm", max(LIMIT, nudged)), ("double", LIMIT)):
            for row in [f"{eps}, {n} {how}" for n, how in shared if eps in settings]:
                found = table[name][row]
                if isinstance(found, str) or found["largest"] > limit:
                    faults.append(f"{name}: {row}: {found}")
    print("\n".join(faults), file=sys.stderr)
    return not faults


def compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """The largest difference, and the share of the numbers whose difference is above LIMIT."""
    import torch

    apart = torch.cat([(a[key].double() - b[key].double()).abs().flatten() for key in b])
    return float(f"{apart.max().item():.2e}"), float(f"{(apart > LIMIT).double().mean().item():.2e}")


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


def memory(millions: int, out: Path | None) -> bool:
    from d2o.evaluation.protocol import hardware

    peaks, numbers = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for strategy in ("replicate", "shard"):
            launch(2, ["player", strategy, str(millions), folder])
            found = [json.loads((Path(folder) / f"{strategy}{rank}.json").read_text()) for rank in range(2)]
            peaks[strategy] = max(one["peak"] for one in found)
            built, numbers = max(one["built"] for one in found), found[0]["parameters"]
            print(
                f"{strategy:<10}{numbers / 1e6:>7.0f} M parameters, peak of a process"
                f" {peaks[strategy] / 2**20:.2f} GiB, when it was built {built / 2**20:.2f} GiB",
                flush=True,
            )
    ratio = round(peaks["shard"] / peaks["replicate"], 3)
    print(f"shard : replicate = {ratio} (asked: at most {MEMORY})")
    if out is not None:
        report = {
            "benchmark": "shard_memory",
            "what": "peak resident set of each of 2 processes that train one network: strategy shard over replicate",
            "ratio": ratio,
            "target": MEMORY,
            "parameters": numbers,
            "peak_mb": {strategy: round(size / 2**10, 1) for strategy, size in peaks.items()},
            "hardware": hardware(),
            "date": datetime.date.today().isoformat(),
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
    return ratio <= MEMORY


def launch(processes: int, arguments: list[str]) -> None:
    """This file as so many processes; SystemExit where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, **common, "RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(processes)
    ]
    if any([process.wait() for process in running]):
        raise SystemExit(f"{' '.join(arguments)} failed with {processes} processes")


def main() -> None:
    inner = {
        "train": lambda a: train(Path(a[0]), a[1], a[2], a[3:]),
        "player": lambda a: player(a[0], int(a[1]), Path(a[2])),
    }
    if len(sys.argv) > 1 and sys.argv[1] in inner:
        return inner[sys.argv[1]](sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("equal", "memory"))
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", nargs="+", default=list(RECIPES))
    parser.add_argument("--eps", nargs="+", choices=("calm", "own", "double"), default=["calm", "own"])
    parser.add_argument("--strategies", nargs="+", choices=("shard", "replicate"), default=["shard", "replicate"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--millions", type=int, default=200)
    asked = parser.parse_args()
    if asked.what == "equal":
        good = equal(asked.processes, asked.only, asked.strategies, asked.eps, asked.out)
    else:
        good = memory(asked.millions, asked.out)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
