"""What a recipe will build and cost, found out without training: the method's own step runs once on the meta device, which computes nothing."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from d2o.data.pair_files import open_store, store_folder
from d2o.diffusion.solvers import Solver
from d2o.errors import MissingImages, UserError
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import read_meta, resolve_checkpoint
from d2o.methods.base import Batch, Draws, Method, Setup, get_method
from d2o.metrics.features import load_extractor
from d2o.metrics.named_references import is_named, lookup
from d2o.networks.budget import file_holdings
from d2o.networks.build import build_network, count_parameters
from d2o.networks.freeze import freeze
from d2o.students.base import Student, make_student
from d2o.teachers import catalogue
from d2o.teachers.base import Spec, Teacher
from d2o.teachers.registry import BUILTIN, asset, load_teacher, planned_teacher
from d2o.training.evaluation import times
from d2o.training.setup import open_data, pair_folder, pair_settings
from d2o.training.share import checkpointed, divide

META = torch.device("meta")
MOMENTS = {"adam": 2, "adamw": 2, "radam": 2, "sgd": 1}


@dataclass
class Plan:
    """Parameters by network, bytes of memory and disk by part, network calls by phase; what is missing, and what cannot be trained so at all."""

    networks: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    iterations: int = 0


def make_plan(recipe: Any, start: Path | None = None, teachers: dict[str, Teacher] | None = None) -> Plan:
    """Never raises: what is absent is listed in `missing`, what the method would refuse in `refused`. `teachers`: loaded for another plan."""
    plan = Plan(iterations=-(-recipe.images // recipe.batch))
    method_class = get_method(recipe.method)
    needs = method_class.needs(recipe.options)
    setup = Setup(recipe.options, network=recipe.network, student=recipe.student, device=META, name=recipe.name, seed=recipe.seed, batch=recipe.batch)
    if recipe.teacher:
        known = {} if teachers is None else teachers
        setup.teacher = known.get(recipe.teacher) or _attempt(plan.missing, lambda: known.setdefault(recipe.teacher, _teacher(plan, recipe.teacher)))
    if start is not None:
        setup.start = _attempt(plan.missing, lambda: _student(start))
    if needs == "images":
        if recipe.data is None:
            plan.missing.append("images: give --data PATH or a `data:` section")
        else:
            setup.images = _attempt(plan.missing, lambda: _images(plan, recipe.data, method_class))
    if needs == "none" and recipe.teacher is None:
        plan.missing.append(f"a teacher: method {recipe.method} learns from one alone; give `teacher:`")
        return plan
    if recipe.eval and recipe.eval.extractor:
        _attempt(plan.missing, lambda: _extractor(recipe.eval.extractor))
        _attempt(plan.missing, lambda: _reference(recipe.eval.reference))
    if setup.teacher is not None:
        plan.networks["teacher (frozen)"] = count_parameters(setup.teacher.network)
        plan.memory["teacher weights"] = 4 * plan.networks["teacher (frozen)"]
        if recipe.pairs:
            _plan_pairs(plan, recipe, setup.teacher.spec)
    if (recipe.teacher and setup.teacher is None) or (needs == "images" and setup.images is None):
        return plan
    method = _attempt(plan.refused, lambda: _build(method_class, setup))
    parts = _attempt(plan.refused, lambda: divide(recipe))
    if method is not None and parts is not None:
        if recipe.checkpointing:
            _attempt(plan.refused, lambda: checkpointed(recipe, method.networks(), setup.teacher))
        _plan_training(plan, recipe, method, setup, parts[1])
    return plan


def _build(method_class: type[Method], setup: Setup) -> Method:
    with META, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights that are loaded into a network on meta stay where they are: none are needed here
        method = method_class(setup)
        freeze(method.networks()[method.product], setup.student.freeze)
        return method


def _images(plan: Plan, data: Any, method: type[Method]) -> Any:
    """The images, or, where they are missing and the recipe says their shape, what a plan needs to know of them."""
    try:
        return open_data(data, method)
    except MissingImages as error:
        shape = (data.channels, data.resolution, data.resolution)
        if None in shape:
            raise UserError(error.message, "training says how to get them" if data.get else error.hint) from error
        plan.missing.append(f"{error.message}{'; training says how to get them' if data.get else ''} (planned without labels)")
        return SimpleNamespace(shape=shape, classes=0, class_names=[], labels=None, name=Path(data.path).name)


def _attempt(lacking: list[str], make: Any) -> Any:
    try:
        return make()
    except UserError as error:
        lacking.append(str(error).replace("\n", "; "))
        return None


def _extractor(name: str) -> None:
    """What training would refuse; nothing is fetched for a plan."""
    before = os.environ.get("D2O_OFFLINE")
    os.environ["D2O_OFFLINE"] = "1"
    try:
        load_extractor(name)
    except UserError as error:
        what, download, _ = error.message.partition(": cannot download")
        raise UserError(f"{what}; training fetches them" if download else error.message, "" if download else error.hint) from error
    finally:
        os.environ.pop("D2O_OFFLINE")
        if before is not None:
            os.environ["D2O_OFFLINE"] = before


def _reference(name: str) -> None:
    if is_named(name) and not Path(name).exists() and not lookup(name).path.exists():
        raise UserError(f"reference {name} is not on this machine; it is fetched from {lookup(name).url} when it is needed")


def _teacher(plan: Plan, name: str) -> Teacher:
    published = catalogue.find(name)
    if published is not None and not Path(name).exists() and catalogue.local_path(published) is None:
        missing = f"teacher {name} is not on this machine; it is fetched from {published.source} when it is needed ({published.licence})"
        if published.network is None:
            raise UserError(missing)
        plan.missing.append(missing)
        return planned_teacher(published)
    path = asset(BUILTIN[name]) if name in BUILTIN else Path(name)
    if published is not None or path.suffix == ".pkl" or (path / "model_index.json").is_file():
        teacher = load_teacher(name)
        teacher.network.to(META)
        teacher.device = META
        return teacher
    path = resolve_checkpoint(path)
    meta = check_checkpoint(read_meta(path), path)
    if meta.get("kind") != "teacher":
        raise UserError(f"{path} is not a teacher")
    with META:
        return Teacher(build_network(meta["network"], file_holdings([path]), f"{path}: network"), Spec.from_dict(meta["spec"]), META)


def _student(path: Path) -> Student:
    path = resolve_checkpoint(path)
    meta = check_checkpoint(read_meta(path), path)
    if meta.get("kind") != "student":
        raise UserError(f"{path} is not a student")
    with META:
        return make_student(build_network(meta["network"], file_holdings([path]), f"{path}: network"), Spec.from_dict(meta["spec"]), meta["student"])


def _plan_pairs(plan: Plan, recipe: Any, spec: Spec) -> None:
    pairs, folder = recipe.pairs, pair_folder(recipe)
    there = _attempt(plan.refused, lambda: _pairs_there(recipe, folder))
    if there is None or (missing := pairs.n - there) <= 0:
        return
    more = f"{missing:,} more pairs in {folder}" if there else f"the pair store {folder}"
    plan.missing.append(f"{more} (training makes {'them' if there else 'it'} first)")
    plan.calls["making pairs"] = missing * Solver(pairs.solver, pairs.steps).forwards(pairs.cfg)
    plan.disk[f"pairs ({folder})"] = missing * math.prod(spec.shape) * ((4 if pairs.dtype == "fp32" else 2) + (4 if pairs.store_noise else 0))


def _pairs_there(recipe: Any, folder: Path | str) -> int:
    """Pairs that the recipe's store holds. UserError: it was made with other settings, or is damaged."""
    if store_folder(folder).manifest() is None:
        return 0
    opened, _, settings = open_store(folder)
    different = [line for line in settings.differences(pair_settings(recipe)) if line.split(":")[0] not in ("n", "labels", "decode")]
    if different:
        what = f"{folder} is a pair store with other settings: {', '.join(different)}"
        raise UserError(what, "leave these keys of `pairs:` away, or name another store")
    recorded = opened.recorded()
    return sum(recorded[unit.file]["n"] for unit in settings.units() if unit.file in recorded)


def _plan_training(plan: Plan, recipe: Any, method: Method, setup: Setup, micro: int) -> None:
    trained = 0
    for name, network in method.networks().items():
        plan.networks[name] = count_parameters(network)
        trained += 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    product = 4 * count_parameters(method.networks()[method.product])
    plan.memory["trained weights"] = 4 * sum(count_parameters(n) for n in method.networks().values())
    plan.memory["gradients"] = trained
    plan.memory[f"optimiser ({recipe.optim.name})"] = trained * MOMENTS[recipe.optim.name]
    plan.memory["EMA"] = product
    kept = {name: sum(t.numel() * t.element_size() for t in state.state_dict().values()) for name, state in method.states().items()}
    plan.memory.update({f"{name} (kept beside them)": size for name, size in kept.items() if size > 2**16})
    loop = _CountingLoop(method, micro)
    loop.run(method, _meta_batch(method, setup, micro))
    plan.memory[f"activations (micro-batch {micro})"] = max(loop.peak, loop.bytes) // (2 if recipe.precision == "bf16" else 1)
    plan.calls["training (forward passes of trained networks)"] = loop.calls * recipe.images
    if recipe.eval and recipe.eval.extractor and method.spec() is not None:
        plan.calls[f"evaluation ({times(recipe)} x {recipe.eval.n:,} images)"] = times(recipe) * recipe.eval.n * method.nfe()
    states = plan.memory["trained weights"] + plan.memory[f"optimiser ({recipe.optim.name})"] + product
    plan.disk["checkpoints"] = states + product * (recipe.checkpoint.keep + 1 + (1 if recipe.eval else 0))


def _meta_batch(method: Method, setup: Setup, n: int) -> Batch:
    if method.needs(setup.options) == "none":
        return Batch()
    spec = setup.teacher.spec if setup.teacher else method.spec()
    shape = setup.images.shape if setup.images is not None else spec.shape if spec else ()
    classes = setup.images.classes if setup.images is not None else spec.classes if spec else 0
    x, labels = torch.empty(n, *shape, device=META), torch.empty(n, dtype=torch.int64, device=META) if classes else None
    return Batch(labels=labels, noise=x, target=x, images=x)


class _MetaDraws(Draws):
    def __init__(self, count: int):
        self.count = count

    def randn(self, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape, device=META)

    def rand(self, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape, device=META)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape, dtype=torch.int64, device=META)

    def shared(self, *shape: int) -> Tensor:
        return torch.full(shape, 0.5)


class _CountingLoop:
    """Stands in for the trainer: counts calls of the trained networks, and the bytes that autograd keeps for the backward pass."""

    def __init__(self, method: Method, micro: int):
        self.networks, self.micro, self.calls, self.bytes, self.peak = method.networks(), micro, 0, 0, 0
        self.seen: set[int] = set()
        self.kept: list[Tensor] = []

    def run(self, method: Method, batch: Batch) -> None:
        handles = [net.register_forward_hook(self._count) for net in self.networks.values()]
        for block in [block for net in self.networks.values() for part in net.modules() if getattr(part, "checkpointing", False)
                      for blocks in part.children() if isinstance(blocks, nn.ModuleDict) for block in blocks.values()]:  # fmt: skip
            handles.append(block.register_forward_pre_hook(self._keep))
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t):
            method.step(self, batch, method.heaviest())
        for handle in handles:
            handle.remove()

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """What checkpointing keeps of a block is what goes into it."""
        if torch.is_grad_enabled():
            for tensor in args:
                if isinstance(tensor, Tensor):
                    self._save(tensor)

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.kept.append(tensor)  # alive, so that its address is not used again
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def micro_batches(self, batch: Batch, turn: int = 0) -> Iterator[tuple[Batch, Draws]]:
        yield batch, _MetaDraws(self.micro)

    def backward(self, loss: Tensor) -> None:
        """What was kept is freed here, so that of several backward passes in a step the largest counts."""
        self.peak = max(self.peak, self.bytes)
        self.bytes = 0
        self.seen.clear()
        self.kept.clear()

    def update(self, name: str) -> None: ...

    def net(self, name: str) -> nn.Module:
        return self.networks[name]

    @contextmanager
    def frozen(self, name: str) -> Iterator[nn.Module]:
        yield self.networks[name]

    def everywhere(self, value: Tensor) -> Tensor:
        return value

    def mean(self, values: list[Tensor]) -> Tensor:
        return values[0]
