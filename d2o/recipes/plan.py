"""What a recipe will build and cost, found out without training: the method's own step runs once on the meta device,
which computes nothing."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from d2o.data.data_section import DataSection
from d2o.data.pair_files import open_store, store_folder
from d2o.data.pair_settings import PairSettings
from d2o.data.pairs_section import PairsSection
from d2o.diffusion.solvers import Solver
from d2o.errors import MissingImages, UserError
from d2o.evaluation.extractor import Extractor, check_images_fit
from d2o.evaluation.named_extractors import load_extractor
from d2o.evaluation.named_references import REFERENCES, is_named, lookup
from d2o.evaluation.reference import SHIPPED
from d2o.evaluation.subjects import check_there
from d2o.inputs import JsonObject
from d2o.interop import catalogue
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.download import offline
from d2o.interop.hub import cached_snapshot, is_repository
from d2o.interop.safetensors_io import read_meta, resolve_checkpoint
from d2o.interop.weights import absence_of, wanted
from d2o.methods.base import Method, Setup, get_method
from d2o.methods.teachers import check_kind, check_teacher
from d2o.networks.budget import file_holdings
from d2o.networks.build import build_network, count_parameters
from d2o.networks.fill import fill_network
from d2o.networks.freeze import freeze
from d2o.recipes.counting import META, CountingLoop, meta_batch
from d2o.recipes.memory import disk_of, memory_of
from d2o.recipes.meta_ops import RememberedShapes
from d2o.recipes.schema import Recipe
from d2o.recipes.stages import as_papers_count, stage_before
from d2o.students.base import Student, make_student
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.generate import check_asked
from d2o.teachers.kinds import expected_kind
from d2o.teachers.planned import planned_teacher
from d2o.teachers.registry import load_teacher
from d2o.teachers.stable_diffusion import TextTeacher
from d2o.training.eight_bit import check_installed
from d2o.training.eval_section import Distance
from d2o.training.frozen import count_frozen
from d2o.training.player import check_players
from d2o.training.scoring import OWN_IMAGES, check_cfg_of, open_evaluator, times
from d2o.training.setup import guidance_of, licence_of, open_data, pair_folder, pair_settings, prompts_of, wants_images
from d2o.training.share import checkpointed, divide
from d2o.training.tracker import check_tracker

T = TypeVar("T")


MAKING_PAIRS = "making pairs"
"""Of a plan's calls: those of the teacher, beforehand."""


@dataclass
class Plan:
    """Parameters by network, bytes of memory (of each of the `processes`) and disk by part, network calls by phase.
    `sharded`: the memory under strategy shard, of several processes. `first`: what training makes or fetches before it
    begins.
    Why it would not start: `missing`, what is not there, and `refused`, what does not fit. `whole`: the training itself
    is in it; without something that is missing it may not be."""

    networks: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    sharded: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    iterations: int = 0
    processes: int = 1
    whole: bool = False

    @property
    def network_calls(self) -> int:
        """All of them, each once."""
        return sum(n for what, n in self.calls.items() if "as papers count" not in what)

    @property
    def starts(self) -> bool:
        """Whether training would start."""
        return not self.missing and not self.refused

    def fetched(self, what: str) -> None:
        """Something that is fetched when it is needed: missing where the network is switched off."""
        if setting := offline():
            self.missing.append(f"{what}, and the network is switched off ({setting})")
        else:
            self.first.append(what)


def make_plan(
    recipe: Recipe,
    start: Path | None = None,
    teachers: dict[str, Teacher] | None = None,
    processes: int = 1,
    before: Recipe | None = None,
) -> Plan:
    """All that is wrong is listed, nothing is raised, made or fetched. `start`: the student of `d2o finetune --from`;
    one that is not there is listed, and the training planned as if from the teacher. `before`: the recipe that makes
    it, where another one than it records. `teachers`: loaded for another plan."""
    plan = Plan(iterations=-(-recipe.images // recipe.batch), processes=processes)
    method_class = get_method(recipe.method)
    needs = method_class.needs(recipe.options)
    setup = Setup(
        recipe.options,
        network=recipe.network,
        student=recipe.student,
        device=META,
        name=recipe.name,
        seed=recipe.seed,
        batch=recipe.batch,
        licence=licence_of(recipe),
    )
    setup.guidance = _attempt(plan.refused, lambda: guidance_of(recipe))
    _attempt(plan.missing, lambda: check_tracker(recipe))
    if recipe.eight_bit:
        _attempt(plan.missing, check_installed)
    name = recipe.teacher
    if name and _fits(plan, recipe.method, name):
        known = {} if teachers is None else teachers
        setup.teacher = known.get(name) or _attempt(plan.missing, lambda: known.setdefault(name, _teacher(plan, name)))
        if setup.teacher is not None:
            fits = _attempt(plan.refused, lambda: check_teacher(recipe.method, setup.teacher))
            setup.teacher = None if fits is None else setup.teacher
    elif needs == "none" and recipe.teacher is None:
        plan.missing.append(f"a teacher: method {recipe.method} learns from one alone; give `teacher:`")
    if setup.teacher is not None:
        text = setup.teacher.spec.condition == "text"
        setup.prompts = _attempt(plan.missing, lambda: prompts_of(recipe, text))
        if text and setup.prompts is None and needs != "pairs":
            setup.teacher = None  # nothing can be asked of it
    if start is not None:
        setup.start = _attempt(plan.missing, lambda: _student(start))
        before = before or stage_before(start, recipe)
    setup.captioned = wants_images(recipe) and (needs == "images" or recipe.prompts is not None)
    if wants_images(recipe):
        if (data := recipe.data) is None:
            plan.missing.append("images: give --data PATH or a `data:` section")
        else:
            setup.images = _attempt(plan.missing, lambda: _images(plan, data, method_class, recipe.network))
    if needs == "pairs" and (recipe.pairs is None or recipe.teacher is None):
        plan.missing.append(f"pairs: method {recipe.method} needs `teacher:` and `pairs:` in the recipe")
    asked = recipe.eval.distance if recipe.eval else None
    evaluator = None if asked is None else _evaluator(plan, recipe, asked)
    if (teacher := setup.teacher) is not None:
        plan.networks["teacher (frozen)"] = count_parameters(teacher.network)
        plan.memory["teacher weights"] = 4 * plan.networks["teacher (frozen)"]
        if teacher.guide is not None:
            plan.networks["its guide (frozen)"] = count_parameters(teacher.guide.network)
            plan.memory["guide weights"] = 4 * plan.networks["its guide (frozen)"]
        if isinstance(teacher, TextTeacher):
            plan.networks["text encoders (frozen)"] = sum(map(count_parameters, teacher.text.encoders))
            plan.memory["text encoders"] = 4 * plan.networks["text encoders (frozen)"]
        if name and (pairs := recipe.pairs):
            _attempt(plan.refused, lambda: _plan_pairs(plan, name, pairs, teacher))
    lacking = (
        (recipe.teacher or needs == "none") and setup.teacher is None,
        wants_images(recipe) and setup.images is None,
    )
    if any(lacking):
        return plan
    guessed = start is not None and setup.start is None  # what is wrong with that is not the user's mistake
    method = _attempt([] if guessed else plan.refused, lambda: _build(plan, method_class, setup))
    parts = _attempt(plan.refused, lambda: divide(recipe, 0, processes))
    if method is not None:
        _attempt(plan.refused, lambda: _check_metric(recipe, method, evaluator))
    if method is not None and parts is not None:
        if recipe.checkpointing:
            _attempt(plan.refused, lambda: checkpointed(recipe, method.players(), setup.teacher))
        _plan_training(plan, recipe, method, setup, parts[1], before)
    return plan


def _fits(plan: Plan, method: str, teacher: str) -> bool:
    """Whether the method takes the teacher, as far as its name or file says it."""
    kind = expected_kind(teacher)
    before = len(plan.refused)
    if kind is not None:
        _attempt(plan.refused, lambda: check_kind(method, kind))
    return len(plan.refused) == before


def _build(plan: Plan, method_class: type[Method], setup: Setup) -> Method:
    with META, RememberedShapes(), wanted() as weights, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # weights that are loaded into a network on meta stay where they are: none are needed here
        method = method_class(setup)
        freeze(method.players()[method.product], setup.student.freeze)
    for name, given in weights:
        if what := _attempt(plan.missing, partial(absence_of, name, given)):
            plan.fetched(what)
    return method


class MissingSet(SimpleNamespace):
    """What a plan needs to know of images that are not here."""

    def __len__(self) -> int:
        return 0


def _images(plan: Plan, data: DataSection, method: type[Method], network: JsonObject | None) -> Any:  # noqa: ANN401 (images, or what stands in for them)
    """The images, or, where they are missing and the recipe says their shape, what a plan needs to know of them; their
    classes where its network names their number."""
    try:
        return open_data(data, method)
    except MissingImages as error:
        channels = data.channels and data.channels * (3 if method.triplets else 1)
        shape = (channels, data.resolution, data.resolution)
        if None in shape:
            raise UserError(error.message, "training says how to get them" if data.get else error.hint) from error
        classes = int((network or {}).get("classes", 0))
        without = "" if classes else " (planned without labels)"
        plan.missing.append(f"{error.message}{'; training says how to get them' if data.get else ''}{without}")
        labels = torch.zeros(0, dtype=torch.int64) if classes else None
        return MissingSet(shape=shape, classes=classes, class_names=[], labels=labels, name=Path(data.path).name)


def _attempt(lacking: list[str], make: Callable[[], T]) -> T | None:
    try:
        return make()
    except UserError as error:
        lacking.append(str(error))
        return None


def _passes(lacking: list[str], check: Callable[[], None]) -> bool:
    before = len(lacking)
    _attempt(lacking, check)
    return len(lacking) == before


@contextmanager
def _without_network() -> Iterator[None]:
    """Nothing is fetched for a plan."""
    before = os.environ.get("D2O_OFFLINE")
    os.environ["D2O_OFFLINE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("D2O_OFFLINE")
        if before is not None:
            os.environ["D2O_OFFLINE"] = before


def _evaluator(plan: Plan, recipe: Recipe, e: Distance) -> Extractor | None:
    """The extractor of the recipe's `eval:` if it is here. What is not there, and what is not the protocol's, is
    listed."""
    extractor, *others = [_extractor(plan, name) for name in dict.fromkeys([e.extractor, *e.extractors()])]
    here = e.reference in SHIPPED
    if is_named(e.reference) and not Path(e.reference).exists():
        here = lookup(e.reference).path.exists()
        if not here:
            plan.fetched(
                f"reference {e.reference} is not on this machine; it is fetched from {lookup(e.reference).url} when it"
                " is needed"
            )
    elif not here and e.reference != OWN_IMAGES and "://" not in e.reference:
        _attempt(plan.missing, lambda: check_there(e.reference, REFERENCES))
    if extractor is not None and None not in others and here:
        _attempt(plan.refused, lambda: open_evaluator(recipe, torch.device("cpu")))
    return extractor


def _extractor(plan: Plan, name: str) -> Extractor | None:
    try:
        with _without_network():
            return load_extractor(name)
    except UserError as error:
        what, download, _ = error.message.partition(": cannot download")
        if download:
            plan.fetched(f"{what}; training fetches them")
        else:
            plan.missing.append(str(error))
        return None


def _check_metric(recipe: Recipe, method: Method, extractor: Extractor | None) -> None:
    """UserError: the recipe's `eval:` asks for what the method's product does not give, or has a network that does not
    take its images."""
    spec = method.spec()
    check_cfg_of(recipe.eval, method)
    if spec is None and recipe.eval and recipe.eval.metric == "fd":
        raise UserError(f"eval.metric: method {recipe.method} makes no images, so there is no Fréchet distance")
    if (
        recipe.eval
        and recipe.eval.metric != "fd"
        and recipe.eval.extractor is None
        and type(method).validate is Method.validate
    ):
        raise UserError(
            f"eval.metric: method {recipe.method} gives no metric of its own, and so no {recipe.eval.metric}",
            "eval.metric: fd measures it",
        )
    if spec is not None and extractor is not None and not spec.latent:
        check_images_fit(spec.shape, extractor, of="the student's images")


def _teacher(plan: Plan, name: str) -> Teacher:
    published = catalogue.find(name)
    if published is not None and not Path(name).exists() and catalogue.path_if_here(published) is None:
        plan.fetched(
            f"teacher {name} is not on this machine; it is fetched from {published.source} when it is needed"
            f" ({published.licence})"
        )
        return planned_teacher(published)
    if published is None and not Path(name).exists() and is_repository(name) and cached_snapshot(name) is None:
        what = f"teacher {name} is a repository of the hub that is not on this machine; no plan can be made without it"
        raise UserError(what, f"`hf download {name}` fetches it, as training would")
    with _without_network():
        return load_teacher(name, META)


def _student(path: Path) -> Student:
    path = resolve_checkpoint(path)
    meta = check_checkpoint(read_meta(path), path)
    if meta.get("kind") != "student":
        raise UserError(f"{path} is not a student")
    held, lora = file_holdings([path]), bool(meta["network"].get("lora"))
    with META:  # a LoRA's file holds its adapters alone
        network = build_network(meta["network"], None if lora else held, f"{path}: network")
        if lora:
            fill_network(network, held, path, assign=True)
        return make_student(network, Spec.from_dict(meta["spec"], path), meta["student"])


def _plan_pairs(plan: Plan, name: str, pairs: PairsSection, teacher: Teacher) -> None:
    """UserError: settings that do not fit the teacher, or a store of that name with others."""
    folder, spec = pair_folder(name, pairs), teacher.spec
    given = pair_settings(name, pairs)
    settings = given.resolved(spec.solver, spec.steps)
    settings.check()
    teacher.check_cfg(settings.cfg)
    check_asked(settings, spec)
    settings.ode.grid(teacher.schedule)
    there = _pairs_there(given, folder)
    if (missing := pairs.n - there) <= 0:
        return
    plan.first.append(
        f"{missing:,} more pairs are made in {folder}"
        if there
        else f"the pair store {folder} is made ({missing:,} pairs)"
    )
    solver = Solver(pairs.solver, pairs.steps)
    plan.calls[MAKING_PAIRS] = missing * solver.forwards(pairs.cfg)
    plan.calls["making pairs, as papers count (NFE)"] = missing * solver.nfe
    plan.disk[f"pairs ({folder})"] = (
        missing * math.prod(spec.shape) * ((4 if pairs.dtype == "fp32" else 2) + (4 if pairs.store_noise else 0))
    )


def _pairs_there(given: PairSettings, folder: Path | str) -> int:
    """Pairs that the recipe's store holds. UserError: it was made with other settings, or is damaged."""
    if store_folder(folder).manifest() is None:
        return 0
    opened, _, settings = open_store(folder)
    different = [line for line in settings.differences(given) if line.split(":")[0] not in ("n", "labels", "decode")]
    if different:
        what = f"{folder} is a pair store with other settings: {', '.join(different)}"
        raise UserError(what, "leave these keys of `pairs:` away, or name another store")
    recorded = opened.recorded()
    return sum(recorded[unit.file]["n"] for unit in settings.units() if unit.file in recorded)


def _plan_training(plan: Plan, recipe: Recipe, method: Method, setup: Setup, micro: int, before: Recipe | None) -> None:
    players = method.players()
    for name, network in players.items():
        plan.networks[name] = sum(p.numel() for p in network.parameters() if p.requires_grad)
        if held := count_parameters(network) - plan.networks[name]:
            plan.networks[f"{name} (frozen part)"] = held
    for name, count in count_frozen(method).items():
        if name != "teacher":  # that one is counted with what is done before training
            plan.networks[f"{name} (frozen)"] = count
            plan.memory[f"{name} weights"] = 4 * count
    frozen = plan.memory  # what is only called, which every process has whole
    if not _passes(plan.refused, lambda: check_players(recipe, method, players, plan.processes)):
        return
    plan.memory = {**frozen, **memory_of(recipe, method, players, plan.processes, shard=False)}
    if plan.processes > 1:
        plan.sharded = {**frozen, **memory_of(recipe, method, players, plan.processes, shard=True)}
    many = -(-recipe.batch // (micro * plan.processes))
    loop = CountingLoop(method, micro, half=recipe.precision != "fp32", many=many)
    loop.run(method, meta_batch(method, setup, micro))
    if setup.teacher is not None and setup.teacher.spec.latent and (vae := setup.teacher.space.loaded) is not None:
        plan.networks["autoencoder (frozen)"] = count_parameters(vae)
        for memory in [plan.memory, *([plan.sharded] if plan.sharded else [])]:
            memory["autoencoder"] = 4 * plan.networks["autoencoder (frozen)"]
    for memory in [plan.memory, *([plan.sharded] if plan.sharded else [])]:
        memory[f"activations (micro-batch {micro})"] = loop.peak
    plan.calls["training (forward passes of trained networks)"] = round(
        loop.passes(plan.iterations) * plan.processes * recipe.images / (plan.iterations * recipe.batch)
    )
    first = setup.start.nfe if setup.start is not None else before.student.steps if before is not None else 1
    plan.calls |= as_papers_count(recipe, method.nfe(), before, first)
    if recipe.eval and recipe.eval.distance and method.spec() is not None:
        many, each = times(recipe), recipe.eval.samples
        plan.calls[f"evaluation ({many} x {each:,} images)"] = many * each * method.nfe()
    plan.disk["checkpoints"] = disk_of(recipe, method, players)
    plan.whole = True
