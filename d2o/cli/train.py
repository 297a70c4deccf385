"""`d2o train` and `d2o finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from d2o.cli import console
from d2o.cli.pairs import open_device, progress_bar
from d2o.errors import MissingImages, UserError

RECIPE = typer.Argument(help="A recipe file, or the name of one that ships with d2o (such as quickstart).", show_default=False)
SET = typer.Option([], "--set", metavar="KEY=VALUE", help="Override a recipe value, e.g. --set optim.lr=2e-4. Repeatable.", show_default=False)
OUT = typer.Option(None, "--out", help="Run folder. Default: runs/<recipe name>.", show_default=False)
RESUME = typer.Option(False, "--resume", help="Continue the run in --out from its last saved state.")
DATA = typer.Option(None, "--data", help="Images instead of the recipe's: folder, zip, WebDataset tar, LMDB, npz, ...", show_default=False)
ON_BAD = typer.Option(None, "--on-bad", help="Corrupt images: refuse (default) or skip; either way they are named.", show_default=False)
MINI = typer.Option(False, "--mini", help="The recipe's small version: the same code on `digits`, about two minutes on a CPU.")
PLAN = typer.Option(False, "--plan", help="Only print networks, parameters, memory, network calls, disk and what is missing.")
DEVICE = typer.Option(None, "--device", help="cpu, cuda or cuda:N. Default: CUDA if there is one.", show_default=False)


def train(
    recipe: str = RECIPE, set_: list[str] = SET, out: Path = OUT, resume: bool = RESUME, data: str = DATA, on_bad: str = ON_BAD,
    mini: bool = MINI, plan: bool = PLAN, device: str = DEVICE,
) -> None:  # fmt: skip
    """Train what a recipe describes: a one-step student, a teacher, a classifier.

    Missing pairs are made first. The run folder holds recipe.yaml (fully resolved, re-runnable), metrics.jsonl, TensorBoard events, previews
    and checkpoints. Under torchrun (torchrun --nproc-per-node 2 -m d2o train ...) all processes share the recipe's global batch.
    """
    _run(recipe, list(set_), out, resume, data, on_bad, mini, plan, device, None)


def finetune(
    recipe: str = RECIPE,
    from_: Path = typer.Option(..., "--from", help="The student checkpoint to start from (.safetensors), or a run folder.", show_default=False),
    set_: list[str] = SET, out: Path = OUT, resume: bool = RESUME, data: str = DATA, on_bad: str = ON_BAD,
    mini: bool = MINI, plan: bool = PLAN, device: str = DEVICE,
) -> None:  # fmt: skip
    """Train further from a trained student, with any recipe that starts from one. Where it came from is recorded in the result."""
    _run(recipe, list(set_), out, resume, data, on_bad, mini, plan, device, from_)


def _run(name: str, overrides: list[str], out: Path | None, resume: bool, data: str | None, on_bad: str | None, mini: bool, plan: bool,
         device_name: str | None, start: Path | None) -> None:  # fmt: skip
    from d2o.recipes.load import load_recipe

    if data is not None:
        overrides.append(f"data.path={data}")
    if on_bad is not None:
        overrides.append(f"data.on_bad={on_bad}")
    recipe = load_recipe(name, overrides, mini=mini)
    _check_options(recipe, data or on_bad, start)
    if plan:
        from d2o.cli.plan import show_plan

        show_plan(recipe, start)
        return
    folder = out or Path("runs") / (recipe.name + ("-mini" if mini else ""))
    from d2o.runtime import stop_flag
    from d2o.training.distributed import process_group

    device = open_device(device_name)
    with stop_flag() as stop, process_group(device) as (rank, world):
        if not _open_run(folder, recipe, resume, start):
            return
        try:
            _train(recipe, folder, device, rank, world, start, stop)
        except MissingImages as error:
            raise UserError(error.message, f"{error.hint}\n{_ways_on(name, overrides)}") from error


def _ways_on(name: str, overrides: list[str]) -> str:
    """What can be run once the images are there, and what can without them."""
    from d2o.recipes.load import load_recipe

    lines = [f"with them:    d2o train {name} --data PATH"]
    try:
        load_recipe(name, [text for text in overrides if not text.startswith("data.")], mini=True)
        lines.append(f"without them: d2o train {name} --mini     (the same code on small images that are here already)")
    except UserError:  # a recipe without a `mini:` section
        pass
    return "\n".join(lines)


def _check_options(recipe: Any, data: str | None, start: Path | None) -> None:
    """Refuse what the recipe's method would not use."""
    from d2o.methods.base import get_method

    method = get_method(recipe.method)
    if data and method.data != "images":
        raise UserError(f"--data and --on-bad: method {recipe.method} of {recipe.name} trains on {method.data}, not on images", "leave them away")
    if start and method.product != "student":
        raise UserError(f"method {recipe.method} of {recipe.name} trains a {method.product}; it cannot start from a student", "use `d2o train`")


def _open_run(folder: Path, recipe: Any, resume: bool, start: Path | None) -> bool:
    """Refuse to overwrite or to mix runs; False when the run in the folder is finished already."""
    from d2o.interop.safetensors_io import read_meta
    from d2o.recipes.load import diff_recipes, load_recipe

    before, state = folder / "recipe.yaml", folder / "checkpoints" / "state.safetensors"
    if not folder.exists() or not any(folder.iterdir()):
        return True
    if not before.exists():
        raise UserError(f"{folder} holds other files and no run", "choose another --out")
    if not resume:
        raise UserError(f"{folder} holds a run already", "--resume continues it; another --out starts a new one")
    changes = diff_recipes(load_recipe(str(before)).resolved(), recipe.resolved())
    if changes:
        what = f"the recipe differs from the one that {folder} was started with:\n  " + "\n  ".join(changes)
        raise UserError(what, "restore it, or choose another --out")
    if state.exists():
        record = read_meta(state)
        was, now = record.get("start"), str(start) if start else None
        if was != now:
            what = f"{folder} was started from {was or 'no student'}, not from {now or 'no student'}"
            raise UserError(what, "give the same --from, or choose another --out")
        if record["images"] >= recipe.images and (folder / "checkpoints" / "last.safetensors").exists():
            console.say(f"{folder} is finished ({record['images']:,} images); nothing to do")
            return False
    return True


def _train(recipe: Any, folder: Path, device: Any, rank: int, world: int, start: Path | None, stop: Any) -> None:
    from d2o.interop.safetensors_io import atomic_write
    from d2o.training.distributed import barrier
    from d2o.training.loop import Trainer
    from d2o.training.setup import prepare, provenance_of

    with progress_bar("pairs", "pairs") as progress:
        setup = prepare(recipe, device, start, console.say, progress, stop)
    trainer = Trainer(recipe, setup, folder, rank, world, start=start, provenance=provenance_of(setup))
    if rank == 0:
        atomic_write(folder / "recipe.yaml", recipe.to_yaml())
    barrier(world)
    trainer.resume()
    described = ", ".join(f"{name} {sum(p.numel() for p in net.parameters()):,} parameters" for name, net in trainer.networks.items())
    console.say(f"{recipe.name}: method {recipe.method}; {described}; {recipe.images:,} images, batch {recipe.batch}, {device}, {folder}")
    if trainer.iteration:
        console.say(f"resumed after {trainer.iteration * recipe.batch:,} images")
    with console.meter("train", recipe.images, done=min(trainer.iteration * recipe.batch, recipe.images)) as bar:
        trainer.run(bar.update, stop)
    for key, value in trainer.scores.items():
        console.say(f"{key} {value:.4g}")
    if trainer.watch.verdict:
        console.say(f"watch: {trainer.watch.verdict}")
    console.say(f"wrote {folder / 'checkpoints' / 'last.safetensors'}")
