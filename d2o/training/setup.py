"""From a recipe to what a method is built from: teacher, pair store, images. Here missing pairs are made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from d2o.data.images import open_images
from d2o.data.pairs import PairStore
from d2o.errors import UserError
from d2o.methods.base import Setup, get_method
from d2o.runtime import StopFlag
from d2o.students.base import load_student
from d2o.teachers.generate import PairSettings, make_pairs
from d2o.teachers.registry import load_teacher

Report = Callable[[str], None]


def pair_folder(recipe: Any) -> Path:
    """Where the recipe's pairs are, or will be: `pairs.path`, or a name made of the settings under runs/pairs."""
    pairs = recipe.pairs
    if pairs.path:
        return Path(pairs.path)
    teacher = Path(str(recipe.teacher)).stem
    cfg = "" if pairs.cfg == 1.0 else f"-cfg{pairs.cfg:g}"
    labels = "" if pairs.labels == "random" else f"-{pairs.labels.replace(',', '_')}"
    return Path("runs") / "pairs" / f"{teacher}-{pairs.solver}{pairs.steps}{cfg}{labels}-n{pairs.n}-seed{pairs.seed}"


def pair_settings(recipe: Any) -> PairSettings:
    pairs = recipe.pairs
    return PairSettings(
        teacher=recipe.teacher, n=pairs.n, seed=pairs.seed, solver=pairs.solver, steps=pairs.steps, cfg=pairs.cfg, labels=pairs.labels,
        shard_size=pairs.shard_size, store_noise=pairs.store_noise,
    )  # fmt: skip


def prepare(
    recipe: Any, device: torch.device, start: str | Path | None, say: Report, progress: Callable[[int, int, str], None], stop: StopFlag
) -> Setup:
    """Load, check and where needed make what the recipe names. UserError for whatever is missing."""
    method = get_method(recipe.method)
    setup = Setup(recipe.options, network=recipe.network, student=recipe.student, device=device, name=recipe.name, seed=recipe.seed)
    if recipe.teacher is not None:
        setup.teacher = load_teacher(recipe.teacher, device)
    if start is not None:
        setup.start = load_student(start, device)
    if method.data == "images":
        if recipe.data is None:
            raise UserError(f"method {recipe.method} needs images", "give --data PATH, or a `data:` section in the recipe")
        setup.images = open_images(recipe.data.path, resolution=recipe.data.resolution, channels=recipe.data.channels, on_bad=recipe.data.on_bad)
        for note in setup.images.notes:
            say(f"{recipe.data.path}: {note}")
        for name, why in setup.images.bad:
            say(f"{recipe.data.path}: skipped {name}: {why}")
    if method.data == "pairs":
        if recipe.pairs is None or recipe.teacher is None:
            raise UserError(f"method {recipe.method} needs `teacher:` and `pairs:` in the recipe")
        folder = pair_folder(recipe)
        make_pairs(pair_settings(recipe), folder, batch=recipe.pairs.batch, device=device, say=say, progress=progress, stop=stop)
        setup.pairs = PairStore(folder)
    return setup


def provenance_of(setup: Setup) -> list[dict[str, Any]]:
    """The history of the student that training starts from, with that student's own fingerprint last; empty without one."""
    if setup.start is None:
        return []
    before = {"started_from": setup.start.fingerprint, "recipe": setup.start.meta.get("recipe", {}).get("name")}
    return [*setup.start.meta.get("provenance", []), before]
