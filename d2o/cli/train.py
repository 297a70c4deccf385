"""`d2o train` and `d2o finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from d2o.cli import complete, console
from d2o.cli.opening import open_device
from d2o.cli.recipe_options import MINI, RECIPE, RECIPE_OR_TABLE, SET, VARIANT, named
from d2o.cli.train_run import begin_run, begun_recipe, check_options, check_run, finish_run, opened
from d2o.errors import UserError

if TYPE_CHECKING:
    import torch

    from d2o.recipes.schema import Recipe

OUT = typer.Option(
    None,
    "--out",
    help="Run folder. Default: `runs/<recipe name>`; of a sweep `runs/<recipe name>-sweep-<keys>`.",
    show_default=False,
)
RESUME = typer.Option(
    False,
    "--resume",
    help=(
        "Continue the run in --out from its last saved state. What its past does not depend on may change: "
        "images (with a constant learning rate), eval, preview, checkpoint, log_every, tracker."
    ),
)
DATA = typer.Option(
    None,
    "--data",
    help=(
        "Images instead of the recipe's: folder, zip, WebDataset tar, LMDB, npz, ... "
        "Their licence is `--set data.licence=...`."
    ),
    show_default=False,
    autocompletion=complete.files,
)
ON_BAD = typer.Option(
    None,
    "--on-bad",
    help="Corrupt images: refuse (default) or skip; either way they are named.",
    show_default=False,
    autocompletion=complete.among("refuse", "skip"),
)
PROCESSES = typer.Option(
    None,
    "--processes",
    min=1,
    metavar="N",
    help="With --plan: what each of so many processes needs, under strategy replicate and shard.",
    show_default=False,
)
PLAN = typer.Option(
    False,
    "--plan",
    help=(
        "Only print networks, parameters, memory, network calls, disk, and all that is missing or does not fit. "
        "Exit code 0: it would start; 1: it would not."
    ),
)
SWEEP = typer.Option(
    [],
    "--sweep",
    metavar="KEY=A,B,...",
    help=(
        "Train once for each of these values of a recipe's key, or of one in its method's "
        "section: alpha=0,0.5,1; or as each of these variants: variant=mse,l1. Repeatable: every combination. "
        "The same command again continues."
    ),
    show_default=False,
    autocompletion=complete.keys,
)
TABLE = typer.Option(
    None,
    "--table",
    help=(
        "Instead of a recipe: all that a table (recipes/tables/*.yaml, by name or path) names and that is not trained"
        " yet, with each of its seeds. --out is then the folder of all runs (default: runs; with --mini runs/mini)."
        " The same command again continues."
    ),
    show_default=False,
    autocompletion=complete.tables,
)
SEED = typer.Option(
    None,
    "--seed",
    min=0,
    max=2**32 - 1,
    help="Seed of everything random in training, instead of the recipe's.",
    show_default=False,
)
PRECISION = typer.Option(
    None,
    "--precision",
    help=(
        "Instead of the recipe's: fp32; bf16; fp16, with dynamic loss scaling; auto: bf16 where the "
        "processor computes in it."
    ),
    show_default=False,
    autocompletion=complete.among("fp32", "bf16", "fp16", "auto"),
)
DEVICE = typer.Option(
    None,
    "--device",
    help="cpu, cuda or cuda:N. Default: CUDA if there is one.",
    show_default=False,
    autocompletion=complete.among("cpu", "cuda", "cuda:0"),
)


def train(
    recipe: str = RECIPE_OR_TABLE,
    variant: list[str] = VARIANT,
    set_: list[str] = SET,
    out: Path = OUT,
    resume: bool = RESUME,
    data: str = DATA,
    on_bad: str = ON_BAD,
    mini: bool = MINI,
    plan: bool = PLAN,
    processes: int = PROCESSES,
    sweep: list[str] = SWEEP,
    table: str = TABLE,
    seed: int = SEED,
    precision: str = PRECISION,
    device: str = DEVICE,
) -> None:
    """Train what a recipe describes: a one-step student, a teacher, a classifier.

    Missing pairs are made first. The run folder holds recipe.yaml (fully resolved, re-runnable), metrics.jsonl,
    TensorBoard events, previews and checkpoints. Under torchrun (torchrun --nproc-per-node 2 -m d2o train ...) all
    processes share the recipe's global batch.
    """
    if table is not None:
        from d2o.cli.train_table import train_table

        beside: dict[str, object] = {"a recipe": recipe, "--variant": variant, "--data": data, "--on-bad": on_bad}
        beside |= {"--sweep": sweep, "--seed": seed is not None, "--processes": processes}
        if given := [word for word, value in beside.items() if value]:
            raise UserError(f"--table says what is trained; {', '.join(given)} is too much", "leave it away")
        return train_table(table, _with(list(set_), None, precision), out, mini, plan, device)
    if recipe is None:
        raise UserError("what should be trained? Give a recipe, or --table NAME", "`d2o recipes` lists them")
    name = named(recipe, variant)
    _run(
        name, _with(list(set_), seed, precision), out, resume, data, on_bad, mini, plan, processes, sweep, device, None
    )


def finetune(
    recipe: str = RECIPE,
    variant: list[str] = VARIANT,
    from_: Path = typer.Option(
        ..., "--from", help="The student checkpoint to start from (.safetensors), or a run folder.", show_default=False
    ),
    set_: list[str] = SET,
    out: Path = OUT,
    resume: bool = RESUME,
    data: str = DATA,
    on_bad: str = ON_BAD,
    mini: bool = MINI,
    plan: bool = PLAN,
    processes: int = PROCESSES,
    sweep: list[str] = SWEEP,
    seed: int = SEED,
    precision: str = PRECISION,
    device: str = DEVICE,
) -> None:
    """Train further from a trained student, with any recipe that starts from one. Where it came from is recorded in the
    result."""
    name = named(recipe, variant)
    _run(
        name, _with(list(set_), seed, precision), out, resume, data, on_bad, mini, plan, processes, sweep, device, from_
    )


def _with(overrides: list[str], seed: int | None, precision: str | None) -> list[str]:
    """What has an option of its own, as --set takes it, and after it."""
    if precision is not None:
        from d2o.errors import unknown
        from d2o.networks.processor import AUTO, PRECISIONS

        if precision not in (*PRECISIONS, AUTO):
            raise unknown("precision", precision, (*PRECISIONS, AUTO))
    given = {"seed": seed, "precision": precision}
    return [*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]


def _run(
    name: str,
    overrides: list[str],
    out: Path | None,
    resume: bool,
    data: str | None,
    on_bad: str | None,
    mini: bool,
    plan: bool,
    processes: int | None,
    sweeps: list[str],
    device_name: str | None,
    start: Path | None,
) -> None:
    from d2o.recipes.load import load_recipe

    if processes is not None and (not plan or sweeps):
        raise UserError(
            "--processes is for the --plan of one run",
            f"torchrun starts several processes: torchrun --nproc-per-node {processes} -m d2o train ...",
        )
    if data is not None:
        overrides.append(f"data.path={data}")
    if on_bad is not None:
        overrides.append(f"data.on_bad={on_bad}")
    if sweeps:
        from d2o.cli.sweep import run_sweep

        run_sweep(name, overrides, sweeps, out, data or on_bad, mini, plan, device_name, start)
        return
    recipe = load_recipe(name, overrides, mini=mini)
    for note in recipe.notes:
        console.say(note)
    folder = out or Path("runs") / (recipe.name + ("-mini" if mini else ""))
    if resume and (begun := begun_recipe(folder)) is not None:
        recipe = load_recipe(name, overrides, mini=mini, begun=begun.resolved())
    if plan:
        return _plan(recipe, folder, resume, data or on_bad, device_name, start, processes or 1)
    check_options(recipe, data or on_bad, start)
    if data is not None and recipe.data is not None and recipe.data.licence is None:
        console.say(
            "the licence of these images is not stated; --set data.licence=... records it in what is trained on them"
        )
    from d2o.runtime import stop_flag
    from d2o.training.distributed import process_group

    device = open_device(device_name)
    with (
        stop_flag() as stop,
        process_group(device) as (rank, world),
        opened(folder, recipe, resume, start, device, rank, world) as unfinished,
    ):
        if unfinished:
            finish_run(begin_run(name, overrides, recipe, folder, device, rank, world, start, stop), stop)
        else:
            console.say(f"{folder} is finished ({recipe.images:,} images); nothing to do")


def _plan(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    data: str | None,
    device_name: str | None,
    start: Path | None,
    processes: int,
) -> None:
    """`--plan`: all that would keep the command from starting, in one answer. typer.Exit 1 if there is any."""
    from d2o.cli.plan import show_fit, show_plan, verdict
    from d2o.interop.outputs import check_output
    from d2o.recipes.plan import make_plan

    plan = make_plan(recipe, start, processes=processes)
    checks = (
        lambda: check_options(recipe, data, start),
        lambda: check_output(folder, folder=True),
        lambda: check_run(folder, recipe, resume, start),
        lambda: devices.append(open_device(device_name)),
    )
    devices: list[torch.device] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            plan.refused.append(str(error))
    show_plan(recipe, plan)
    for device in devices:
        show_fit(recipe, plan, device)
    verdict([plan])
