"""From a recipe to what a method is built from: teacher, pair store, images. Here missing pairs are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from d2o.data.data_section import DataSection
from d2o.data.images import ImageSet
from d2o.data.known import GET
from d2o.data.pair_settings import PairSettings
from d2o.data.pairs_section import PairsSection
from d2o.data.prompt_files import open_prompts
from d2o.data.prompts import Prompts
from d2o.data.stored_latents import LatentSet, open_set
from d2o.data.triplets import TripletSet, open_triplets
from d2o.diffusion.guidance import Range, show_cfg
from d2o.diffusion.solvers import Solver
from d2o.errors import MissingImages, UserError
from d2o.inputs import JsonObject
from d2o.methods.base import Method, Setup, get_method
from d2o.methods.teachers import check_kind, check_teacher
from d2o.networks.freeze import freeze
from d2o.runtime import Say, StopFlag, worker
from d2o.students.base import load_student
from d2o.teachers.base import UNSTATED, Teacher
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.teachers.kinds import expected_kind
from d2o.teachers.registry import load_teacher
from d2o.training.eight_bit import check_installed
from d2o.training.player import check_players
from d2o.training.raw_start import fill_raw, wants_raw
from d2o.training.scoring import Scoring, open_evaluator
from d2o.training.share import checkpointed, divide

if TYPE_CHECKING:
    from d2o.recipes.schema import Recipe


def pair_folder(teacher: str, pairs: PairsSection) -> Path | str:
    """Where a recipe's pairs are, or will be: `pairs.path`, or a name made of the settings under runs/pairs."""
    if pairs.path:
        return pairs.path if "://" in pairs.path else Path(pairs.path)
    return pair_settings(teacher, pairs).folder(pairs.precision)


def pair_settings(teacher: str, pairs: PairsSection) -> PairSettings:
    """The settings of the store that a recipe's teacher and `pairs:` stand for."""
    names = [field.name for field in fields(PairSettings) if field.name != "teacher" and hasattr(pairs, field.name)]
    return PairSettings(teacher, **{name: getattr(pairs, name) for name in names})


def learned_solver(recipe: Recipe, teacher: Teacher | None) -> Solver | None:
    """The solver whose output the student learns to make: that of its pairs, else the teacher's own (for stochastic
    pairs, too: what each of their samples was drawn with is not drawn again). None without a teacher."""
    if teacher is None or recipe.teacher is None:
        return None
    own = teacher.solver()
    if recipe.pairs is None:
        return own
    pairs = pair_settings(recipe.teacher, recipe.pairs).resolved(own.name, own.steps).ode
    return own if pairs.stochastic else pairs


def guidance_of(recipe: Recipe) -> Range | None:
    """The guidance scales of the recipe's pairs, where each has its own. UserError: the method's student cannot be told
    it."""
    method = get_method(recipe.method)
    if recipe.pairs is None or not isinstance(cfg := recipe.pairs.cfg, tuple):
        return None
    if method.needs(recipe.options) != "pairs" or not method.tells:
        raise UserError(
            f"pairs.cfg: {show_cfg(cfg)} gives each pair a guidance scale of its own, which students of method"
            f" {recipe.method} are not told",
            "give one number, or a method that tells them: diffusion2gan or ode",
        )
    return cfg


def learned_cfg(recipe: Recipe) -> float | Range:
    """The teacher's guidance in what the student learns: that of its pairs, else the method's own; 1: none."""
    return recipe.pairs.cfg if recipe.pairs is not None else getattr(recipe.options, "cfg", 1.0)


def open_data(data: DataSection, method: type[Method]) -> ImageSet | LatentSet | TripletSet:
    """The images of a recipe's `data:` section, stored latents, or triplets for a method of those. MissingImages, with
    how to get them, if nothing is at the path; UserError as `open_set` and `open_triplets`, or: the method takes no
    stored latents."""
    try:
        if method.triplets:
            return open_triplets(data.path, resolution=data.resolution, channels=data.channels, limit=data.limit)
        found = open_set(
            data.path, resolution=data.resolution, channels=data.channels, on_bad=data.on_bad, limit=data.limit
        )
    except MissingImages as error:
        about = "" if data.get is None else GET.get(data.get, data.get).strip() + "\n"
        raise MissingImages(error.message, about + error.hint) from error
    if isinstance(found, LatentSet):
        if not method.stored_latents:
            raise UserError(f"{found.name} holds stored latents, and this method takes images")
        if data.xflip:
            raise UserError(
                "data.xflip: stored latents are not mirrored: the latent of a mirrored image is another",
                "store both when encoding",
            )
    return found


def licence_of(recipe: Recipe) -> str:
    """The licence of the recipe's images."""
    return UNSTATED if recipe.data is None or recipe.data.licence is None else recipe.data.licence


def prompts_of(recipe: Recipe, text: bool) -> Prompts | None:
    """The prompts that the recipe names, here or for its pairs; None where the method has them from its pairs alone.
    UserError: none for a teacher that takes prompts (`text`), or some for another."""
    path = recipe.prompts or (recipe.pairs.prompts if recipe.pairs else None)
    if not text:
        if recipe.prompts:
            raise UserError(f"prompts: teacher {recipe.teacher!r} takes none", "take `prompts` out")
        return None
    if path is None and get_method(recipe.method).needs(recipe.options) != "pairs":
        raise UserError(
            f"teacher {recipe.teacher!r} takes prompts, and the recipe has no `prompts:`",
            "prompts: FILE names a .txt (one a line), .jsonl or .parquet; with `data:` one for each image",
        )
    return None if path is None else open_prompts(path)


def first_prompts(setup: Setup, n: int) -> list[str]:
    """The first n prompts that the student is asked for in training; none where it takes none."""
    if setup.prompts is not None:
        return setup.prompts.many(range(min(n, len(setup.prompts))))
    pairs = setup.pairs
    return pairs.prompts(range(min(n, len(pairs)))) if pairs is not None and pairs.has_prompts else []


def wants_images(recipe: Recipe) -> bool:
    """Whether training reads images of `data:`, alone or beside pairs."""
    method = get_method(recipe.method)
    return method.needs(recipe.options) == "images" or method.real_share(recipe.options) > 0


def check_captions(setup: Setup) -> None:
    """UserError: prompts that go with images, and are more or fewer."""
    if (
        setup.prompts is not None
        and setup.captioned
        and setup.images is not None
        and len(setup.prompts) != len(setup.images)
    ):
        raise UserError(
            f"prompts: {len(setup.prompts):,} for the {len(setup.images):,} images of `data:`; with images there is one"
            " for each, in their order"
        )


def prepare(
    recipe: Recipe,
    device: torch.device,
    start: str | Path | None,
    say: Say,
    progress: Callable[[int, int, str], None],
    stop: StopFlag,
) -> Setup:
    """Load, check and where needed make what the recipe names. UserError for whatever is missing or does not fit: first
    what is found out from names and local files, then what may have to be fetched."""
    method = get_method(recipe.method)
    setup = Setup(
        recipe.options,
        network=recipe.network,
        student=recipe.student,
        device=device,
        name=recipe.name,
        seed=recipe.seed,
        batch=recipe.batch,
        licence=licence_of(recipe),
        guidance=guidance_of(recipe),
    )
    if recipe.eight_bit:
        check_installed()
    needs = method.needs(recipe.options)
    if needs == "none" and recipe.teacher is None:
        raise UserError(
            f"method {recipe.method} learns from a teacher alone, and the recipe has no `teacher:`",
            "d2o teachers lists some",
        )
    kind = None if recipe.teacher is None else expected_kind(recipe.teacher)
    if kind is not None:
        check_kind(recipe.method, kind)
        setup.prompts = prompts_of(recipe, kind.text)
    setup.captioned = wants_images(recipe) and (needs == "images" or recipe.prompts is not None)
    if wants_images(recipe):
        if recipe.data is None:
            raise UserError(
                f"method {recipe.method} needs images", "give --data PATH, or a `data:` section in the recipe"
            )
        setup.images = open_data(recipe.data, method)
        for note in setup.images.notes:
            say(f"{recipe.data.path}: {note}")
        for name, why in setup.images.bad:
            say(f"{recipe.data.path}: skipped {name}: {why}")
        check_captions(setup)
    if start is not None:
        setup.start = load_student(start, device)
        if wants_raw(recipe):
            fill_raw(setup.start, Path(start))
    try:
        open_evaluator(recipe, device)
    except UserError as error:
        way = "this is for the recipe's `eval:`; --set eval=null trains without it"
        raise UserError(error.message, f"{error.hint}\n{way}" if error.hint else way) from error
    if recipe.teacher is not None:
        setup.teacher = load_teacher(recipe.teacher, device, say=say)
        check_teacher(recipe.method, setup.teacher)
        setup.prompts = setup.prompts or prompts_of(recipe, setup.teacher.spec.condition == "text")
    if needs == "pairs":
        if recipe.pairs is None or recipe.teacher is None:
            raise UserError(f"method {recipe.method} needs `teacher:` and `pairs:` in the recipe")
        folder, p = pair_folder(recipe.teacher, recipe.pairs), recipe.pairs
        try_out(recipe, setup)
        compute = Compute(
            p.batch, precision=p.precision, channels_last=None if p.channels_last == "auto" else p.channels_last
        )
        setup.pairs = make_pairs(
            pair_settings(recipe.teacher, p),
            folder,
            compute=compute,
            say=say,
            progress=progress,
            stop=stop,
            teacher=setup.teacher,
            prompts=setup.prompts if recipe.prompts is None else None,  # the recipe's own may be others
            lent=True,
        )
    return setup


def try_out(recipe: Recipe, setup: Setup) -> None:
    """UserError: what the method, the number of processes or the evaluation would refuse once the pairs are made."""
    rank, world = worker()
    divide(recipe, rank, world)
    method = get_method(recipe.method)(setup)
    players = method.players()
    freeze(players[method.product], recipe.student.freeze)
    check_players(recipe, method, players, world)
    if recipe.checkpointing:
        checkpointed(recipe, players, setup.teacher)
    Scoring(recipe, method, Path(), setup.device, rank, world, lambda message: None, setup.prompts).check()


def provenance_of(setup: Setup) -> list[JsonObject]:
    """The history of the student that training starts from, with that student's own fingerprint last; empty without
    one."""
    if setup.start is None:
        return []
    before = {"started_from": setup.start.fingerprint, "recipe": (setup.start.meta.get("recipe") or {}).get("name")}
    return [*(setup.start.meta.get("provenance") or []), before]
