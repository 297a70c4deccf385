"""`d2o train` and `d2o finetune`."""

from __future__ import annotations

from pathlib import Path

import typer

from d2o.cli import console
from d2o.cli.pairs import open_device
from d2o.cli.train_run import begin_run, begun_recipe, check_options, finish_run, open_run

RECIPE = typer.Argument(help="A recipe file, or the name of one that ships with d2o (such as quickstart).", show_default=False)
SET = typer.Option([], "--set", metavar="KEY=VALUE", help="Override a recipe value, e.g. --set optim.lr=2e-4. Repeatable.", show_default=False)
OUT = typer.Option(None, "--out", help="Run folder. Default: runs/<recipe name>; of a sweep runs/<recipe name>-sweep-<keys>.", show_default=False)
RESUME = typer.Option(False, "--resume", help="Continue the run in --out from its last saved state.")
DATA = typer.Option(None, "--data", help="Images instead of the recipe's: folder, zip, WebDataset tar, LMDB, npz, ...", show_default=False)
ON_BAD = typer.Option(None, "--on-bad", help="Corrupt images: refuse (default) or skip; either way they are named.", show_default=False)
MINI = typer.Option(False, "--mini", help="The recipe's small version: the same code on `digits`, about two minutes on a CPU.")
PLAN = typer.Option(False, "--plan", help="Only print networks, parameters, memory, network calls, disk and what is missing.")
SWEEP = typer.Option([], "--sweep", metavar="KEY=A,B,...", help="Train once for each of these values of a recipe's key, or of one in its method's "
                     "section: alpha=0,0.5,1. Repeatable: every combination. The same command again continues.", show_default=False)  # fmt: skip
DEVICE = typer.Option(None, "--device", help="cpu, cuda or cuda:N. Default: CUDA if there is one.", show_default=False)


def train(
    recipe: str = RECIPE, set_: list[str] = SET, out: Path = OUT, resume: bool = RESUME, data: str = DATA, on_bad: str = ON_BAD,
    mini: bool = MINI, plan: bool = PLAN, sweep: list[str] = SWEEP, device: str = DEVICE,
) -> None:  # fmt: skip
    """Train what a recipe describes: a one-step student, a teacher, a classifier.

    Missing pairs are made first. The run folder holds recipe.yaml (fully resolved, re-runnable), metrics.jsonl, TensorBoard events, previews
    and checkpoints. Under torchrun (torchrun --nproc-per-node 2 -m d2o train ...) all processes share the recipe's global batch.
    """
    _run(recipe, list(set_), out, resume, data, on_bad, mini, plan, sweep, device, None)


def finetune(
    recipe: str = RECIPE,
    from_: Path = typer.Option(..., "--from", help="The student checkpoint to start from (.safetensors), or a run folder.", show_default=False),
    set_: list[str] = SET, out: Path = OUT, resume: bool = RESUME, data: str = DATA, on_bad: str = ON_BAD,
    mini: bool = MINI, plan: bool = PLAN, sweep: list[str] = SWEEP, device: str = DEVICE,
) -> None:  # fmt: skip
    """Train further from a trained student, with any recipe that starts from one. Where it came from is recorded in the result."""
    _run(recipe, list(set_), out, resume, data, on_bad, mini, plan, sweep, device, from_)


def _run(name: str, overrides: list[str], out: Path | None, resume: bool, data: str | None, on_bad: str | None, mini: bool, plan: bool,
         sweeps: list[str], device_name: str | None, start: Path | None) -> None:  # fmt: skip
    from d2o.recipes.load import load_recipe

    if data is not None:
        overrides.append(f"data.path={data}")
    if on_bad is not None:
        overrides.append(f"data.on_bad={on_bad}")
    if sweeps:
        from d2o.cli.sweep import run_sweep

        run_sweep(name, overrides, sweeps, out, data or on_bad, mini, plan, device_name, start)
        return
    recipe = load_recipe(name, overrides, mini=mini)
    check_options(recipe, data or on_bad, start)
    if plan:
        from d2o.cli.plan import show_plan

        show_plan(recipe, start)
        return
    folder = out or Path("runs") / (recipe.name + ("-mini" if mini else ""))
    if resume:
        recipe = load_recipe(name, overrides, mini=mini, begun=begun_recipe(folder))
    from d2o.runtime import stop_flag
    from d2o.training.distributed import barrier, process_group

    device = open_device(device_name)
    with stop_flag() as stop, process_group(device) as (rank, world):
        unfinished = open_run(folder, recipe, resume, start)
        barrier(world)  # all have looked before one of them writes
        if unfinished:
            finish_run(begin_run(name, overrides, recipe, folder, device, rank, world, start, stop), stop)
        else:
            console.say(f"{folder} is finished ({recipe.images:,} images); nothing to do")

