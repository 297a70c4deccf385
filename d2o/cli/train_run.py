"""One training run, as `d2o train`, `d2o finetune` and their sweeps start it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from d2o.cli import console
from d2o.errors import MissingImages, UserError
from d2o.inputs import JsonObject

if TYPE_CHECKING:
    import torch

    from d2o.recipes.schema import Recipe
    from d2o.runtime import StopFlag
    from d2o.training.loop import Trainer


def check_options(recipe: Recipe, data: str | None, start: Path | None) -> None:
    """Refuse what the recipe's method would not use."""
    from d2o.methods.base import get_method
    from d2o.training.raw_start import check_raw

    method = get_method(recipe.method)
    needs = method.needs(recipe.options)
    if data and needs != "images":
        uses = "no data" if needs == "none" else f"{needs}, not on images"
        raise UserError(
            f"--data and --on-bad: method {recipe.method} of {recipe.name} trains on {uses}", "leave them away"
        )
    if start and method.product not in ("student", "generator"):
        raise UserError(
            f"method {recipe.method} of {recipe.name} trains a {method.product}; it cannot start from a student",
            "use `d2o train`",
        )
    check_raw(recipe, start)


def check_run(folder: Path, recipe: Recipe, resume: bool, start: Path | None) -> JsonObject | None:
    """The record of the state of the run in the folder; None: there is none yet. UserError: the run must not be
    overwritten, or is another one."""
    from d2o.recipes.changes import forbidden
    from d2o.training.checkpoint import read_state
    from d2o.training.choices import as_begun

    before = folder / "recipe.yaml"
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not before.exists():
        raise UserError(f"{folder} holds other files and no run", "choose another --out")
    if not resume:
        raise UserError(f"{folder} holds a run already", "--resume continues it; another --out starts a new one")
    record, begun = read_state(folder), begun_recipe(folder)
    assert begun is not None  # its recipe.yaml is there
    done, known = (record["images"], record.get("data", {})) if record else (0, {})
    changes = forbidden(begun.resolved(), as_begun(recipe, begun).resolved(), done, known)
    if changes:
        what = f"the recipe differs from the one that {folder} was started with:\n  " + "\n  ".join(changes)
        raise UserError(what, _instead(recipe, folder, record is not None))
    if record is not None:
        was, now = record.get("start"), str(start) if start else None
        if was != now:
            what = f"{folder} was started from {was or 'no student'}, not from {now or 'no student'}"
            raise UserError(what, "give the same --from, or choose another --out")
    return record


def _instead(recipe: Recipe, folder: Path, trained: bool) -> str:
    """What can be done about a recipe that a run cannot go on with."""
    from d2o.methods.base import get_method

    ways = ["give the recipe that it was started with"]
    if trained and get_method(recipe.method).product in ("student", "generator"):
        way = f"d2o finetune RECIPE --from {folder} --out ANOTHER"
        ways.append(f"train its student further, as a run of its own: {way}")
    return "; ".join([*ways, "or start anew with another --out"])


@contextmanager
def opened(
    folder: Path, recipe: Recipe, resume: bool, start: Path | None, device: torch.device, rank: int, world: int
) -> Iterator[bool]:
    """Hold the run folder, as the one process (or group of processes) that trains in it. Yields whether there is
    anything
    to do: False of a run that is finished, once the folder is as its state says. UserError: as `check_run`, or the
    folder is held already."""
    from d2o.interop.outputs import check_output
    from d2o.interop.temporary import sweep
    from d2o.training.checkpoint import settle
    from d2o.training.distributed import any_process, first_process
    from d2o.training.products import Products
    from d2o.training.run_folder import locked, tidy

    with ExitStack() as held:

        def hold() -> None:
            check_output(folder, folder=True)
            held.enter_context(locked(folder))
            sweep(folder, "recipe.yaml")  # the rest is tidied once the folder is known to be a run's

        first_process(hold, device, rank, world)
        record = check_run(folder, recipe, resume, start)
        any_process(False, device, world)  # all have looked before one of them writes
        unfinished = record is None or record["iteration"] < -(-recipe.images // recipe.batch)
        if not unfinished and record is not None:
            missing = []
            if rank == 0:
                tidy(folder)
                missing = settle(record, Products(folder / "checkpoints"))
            unfinished = any_process("last" in missing, device, world)
        yield unfinished


def begun_recipe(folder: Path) -> Recipe | None:
    """The recipe that the run in the folder was begun with; None where there is none."""
    from d2o.recipes.load import load_recipe

    path = folder / "recipe.yaml"
    return load_recipe(str(path)) if path.is_file() else None


def begin_run(
    name: str,
    overrides: list[str],
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    rank: int,
    world: int,
    start: Path | None,
    stop: StopFlag,
) -> Trainer:
    """Load and make what the recipe names, and build its networks. `name` and `overrides`: how the user called it, for
    what is missing."""
    from d2o.training.choices import as_begun
    from d2o.training.cpu_threads import settle_threads
    from d2o.training.distributed import barrier
    from d2o.training.loop import Trainer
    from d2o.training.setup import prepare, provenance_of
    from d2o.training.tracker import check_tracker

    recipe = as_begun(recipe, begun_recipe(folder))
    check_tracker(recipe)
    with console.progress_bar("pairs", "pairs") as progress:
        try:
            setup = prepare(recipe, device, start, console.say, progress, stop)
        except MissingImages as error:
            raise UserError(error.message, f"{error.hint}\n{_ways_on(name, overrides, start)}") from error
    trainer = Trainer(recipe, setup, folder, rank, world, start=start, provenance=provenance_of(setup), say=console.say)
    trainer.evaluation.check()  # what is refused leaves no folder
    settle_threads(trainer)
    trainer.resume()
    if rank == 0:
        write_recipe(folder, trainer.recipe, trainer.images)
    barrier(world)
    return trainer


def write_recipe(folder: Path, recipe: Recipe, images: int) -> None:
    """recipe.yaml, with a line at its head for each setting that was changed on the way, and after how many images."""
    from d2o.interop.safetensors_io import atomic_write
    from d2o.recipes.differences import diff_recipes
    from d2o.recipes.load import load_recipe

    path, head = folder / "recipe.yaml", []
    if path.exists():
        changes = diff_recipes(load_recipe(str(path)).resolved(), recipe.resolved())
        if not changes:
            return
        head = [line for line in path.read_text().splitlines() if line.startswith(CHANGED)]
        head += [f"{CHANGED} {images:,} images: {change}" for change in changes]
        for change in changes:
            console.say(f"changed: {change}")
    atomic_write(path, "".join(f"{line}\n" for line in head) + recipe.to_yaml())


CHANGED = "# changed after"


def finish_run(trainer: Trainer, stop: StopFlag) -> None:
    """Train to the end, and say how it went."""
    recipe, folder = trainer.recipe, trainer.folder
    described = ", ".join(
        f"{name} {sum(p.numel() for p in player.parameters.values()):,} parameters"
        for name, player in trainer.players.items()
    )
    shared = f", sharded over {trainer.world} processes" if trainer.strategy.shards else ""
    console.say(
        f"{recipe.name}: method {recipe.method}; {described}; {recipe.images:,} images, batch {recipe.batch},"
        f" {trainer.device}{shared}, {folder}"
    )
    if trainer.iteration:
        console.say(f"resumed after {trainer.images:,} images")
    with console.meter("train", recipe.images, done=trainer.images) as bar:
        trainer.run(bar.update, stop)
    for key, value in trainer.scores.items():
        console.say(f"{key} {value:.4g}")
    if trainer.journal.watch.verdict:
        console.say(f"watch: {trainer.journal.watch.verdict}")
    console.say(f"wrote {folder / 'checkpoints' / 'last.safetensors'}")


def _ways_on(name: str, overrides: list[str], start: Path | None) -> str:
    """What can be run once the images are there, and what can without them."""
    from d2o.recipes.load import load_recipe

    command = f"d2o train {name}" if start is None else f"d2o finetune {name} --from {start}"
    lines = [f"with them:    {command} --data PATH"]
    try:
        load_recipe(name, [text for text in overrides if not text.startswith("data.")], mini=True)
        lines.append(f"without them: {command} --mini     (the same code on small images that are here already)")
    except UserError:  # a recipe without a `mini:` section
        pass
    return "\n".join(lines)
