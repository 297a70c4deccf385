"""One training run, as `d2o train`, `d2o finetune` and their sweeps start it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2o.cli import console
from d2o.cli.pairs import progress_bar
from d2o.errors import MissingImages, UserError

if TYPE_CHECKING:
    from d2o.training.loop import Trainer


def check_options(recipe: Any, data: str | None, start: Path | None) -> None:
    """Refuse what the recipe's method would not use."""
    from d2o.methods.base import get_method

    method = get_method(recipe.method)
    needs = method.needs(recipe.options)
    if data and needs != "images":
        uses = "no data" if needs == "none" else f"{needs}, not on images"
        raise UserError(f"--data and --on-bad: method {recipe.method} of {recipe.name} trains on {uses}", "leave them away")
    if start and method.product not in ("student", "generator"):
        raise UserError(f"method {recipe.method} of {recipe.name} trains a {method.product}; it cannot start from a student", "use `d2o train`")


def begun_recipe(folder: Path) -> dict[str, Any] | None:
    """The resolved recipe of the run in the folder, if there is one."""
    from d2o.recipes.load import load_recipe

    path = folder / "recipe.yaml"
    return load_recipe(str(path)).resolved() if path.is_file() else None


def open_run(folder: Path, recipe: Any, resume: bool, start: Path | None) -> bool:
    """Refuse to overwrite or to mix runs; False when the run in the folder is finished already."""
    from d2o.interop.checkpoint_record import check_checkpoint
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
        record = check_checkpoint(read_meta(state), state)
        was, now = record.get("start"), str(start) if start else None
        if was != now:
            what = f"{folder} was started from {was or 'no student'}, not from {now or 'no student'}"
            raise UserError(what, "give the same --from, or choose another --out")
        if record["images"] >= recipe.images and (folder / "checkpoints" / "last.safetensors").exists():
            return False
    return True


def begin_run(name: str, overrides: list[str], recipe: Any, folder: Path, device: Any, rank: int, world: int, start: Path | None,
              stop: Any) -> Trainer:  # fmt: skip
    """Load and make what the recipe names, and build its networks. `name` and `overrides`: how the user called it, for what is missing."""
    from d2o.interop.safetensors_io import atomic_write
    from d2o.training.distributed import barrier
    from d2o.training.loop import Trainer
    from d2o.training.setup import prepare, provenance_of

    with progress_bar("pairs", "pairs") as progress:
        try:
            setup = prepare(recipe, device, start, console.say, progress, stop)
        except MissingImages as error:
            raise UserError(error.message, f"{error.hint}\n{_ways_on(name, overrides)}") from error
    trainer = Trainer(recipe, setup, folder, rank, world, start=start, provenance=provenance_of(setup), say=console.say)
    if rank == 0:
        atomic_write(folder / "recipe.yaml", recipe.to_yaml())
    barrier(world)
    trainer.resume()
    return trainer


def finish_run(trainer: Trainer, stop: Any) -> None:
    """Train to the end, and say how it went."""
    recipe, folder = trainer.recipe, trainer.folder
    described = ", ".join(f"{name} {sum(p.numel() for p in net.parameters()):,} parameters" for name, net in trainer.networks.items())
    console.say(f"{recipe.name}: method {recipe.method}; {described}; {recipe.images:,} images, batch {recipe.batch}, {trainer.device}, {folder}")
    if trainer.iteration:
        console.say(f"resumed after {trainer.iteration * recipe.batch:,} images")
    with console.meter("train", recipe.images, done=min(trainer.iteration * recipe.batch, recipe.images)) as bar:
        trainer.run(bar.update, stop)
    for key, value in trainer.scores.items():
        console.say(f"{key} {value:.4g}")
    if trainer.watch.verdict:
        console.say(f"watch: {trainer.watch.verdict}")
    console.say(f"wrote {folder / 'checkpoints' / 'last.safetensors'}")


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
