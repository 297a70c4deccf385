"""The method contract: one iteration of a paper's algorithm box, and what the loop offers it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from d2o.condition import Condition
from d2o.data.images import ImageSet
from d2o.data.pairs import PairStore
from d2o.data.prompts import Prompts
from d2o.data.stored_latents import LatentSet
from d2o.data.triplets import TripletSet
from d2o.diffusion.guidance import Range
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject
from d2o.networks.config import Config
from d2o.settings.section import Section
from d2o.students.base import Student
from d2o.students.student_section import StudentSection
from d2o.teachers.base import UNSTATED, Spec, Teacher


class Options(Section):
    """A method's own section of a recipe."""

    model_config = ConfigDict(allow_inf_nan=True)  # infinity is a setting of some: no limit


O = TypeVar("O", bound=Options)
S = TypeVar("S", bound=Section)


def find_methods() -> dict[str, str]:
    """Name -> module, of the files beside this one with a line `METHOD = ...`: a method is there when its file is.
    The file `dd_gan.py` is method `dd-gan`. They are read as text, as importing them all takes seconds."""
    package = __name__.rpartition(".")[0]
    files = sorted(path for folder in import_module(package).__path__ for path in Path(folder).glob("*.py"))
    return {
        path.stem.replace("_", "-"): f"{package}.{path.stem}"
        for path in files
        if re.search(r"^METHOD = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


METHODS = find_methods()


def method_names() -> list[str]:
    return sorted(METHODS)


def get_method(name: str) -> type[Method[Any]]:
    """The method's class. UserError names the known ones."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return import_module(METHODS[name]).METHOD


@dataclass
class Setup(Generic[O]):
    """What a method is built from. `network` and `student` are the recipe's sections of that name; `start` is the
    student that `d2o finetune --from` starts from."""

    options: O
    teacher: Teacher | None = None
    network: Config | None = None
    student: StudentSection = field(default_factory=StudentSection)
    images: ImageSet | LatentSet | TripletSet | None = None
    pairs: PairStore | None = None
    prompts: Prompts | None = None  # to draw from, for teachers that take text
    captioned: bool = True  # whether those are the images' own, one each, where there are images
    start: Student | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    name: str = "model"
    seed: int = 0
    batch: int = 1  # images of an iteration, of all processes together
    licence: str = UNSTATED  # of the images (`data.licence`), and so of what is trained on them alone
    guidance: Range | None = None  # of the pairs, where each has a guidance scale of its own

    def product_licence(self) -> str:
        """The licence of what is trained on the images alone: theirs, and that of the student it starts from."""
        licences = [self.licence] + ([self.start.spec.licence] if self.start is not None else [])
        stated = list(dict.fromkeys(licence for licence in licences if licence != UNSTATED))
        return "; ".join(stated) or UNSTATED

    def need_network(self) -> Config:
        if not self.network:
            raise UserError("the recipe has no `network:` section, and this method trains one from scratch")
        return self.network


@dataclass
class Reals:
    """Real images for the rows `rows` (in ascending order) of a batch: `images` [k, ...], or None for no rows."""

    rows: list[int]
    images: Tensor | None
    condition: Condition

    def part(self, start: int, stop: int) -> Reals:
        chosen = [i for i, row in enumerate(self.rows) if start <= row < stop]
        rows = [self.rows[i] - start for i in chosen]
        part = slice(chosen[0], chosen[-1] + 1) if chosen else slice(0)
        return Reals(rows, self.images[part] if self.images is not None and chosen else None, self.condition[part])


@dataclass
class Batch:
    """A part of a batch. Pairs: noise, condition, target. Images: images in [-1, 1] (or stored latents), condition; of
    triplets the three in the channels, and as target [B] their judgements. Tensors [B, ...] on the device. Methods that
    need no data get one with nothing in it: they draw what they need by the `Draws` that come with it. `reals`: real
    images for some of the rows of pairs (`Method.real_share`).
    """

    condition: Condition = field(default_factory=lambda: Condition.none(0))
    noise: Tensor | None = None
    target: Tensor | None = None
    images: Tensor | None = None
    reals: Reals | None = None

    def __len__(self) -> int:
        return next((len(t) for t in (self.images, self.noise) if t is not None), len(self.condition))

    def part(self, start: int, stop: int) -> Batch:
        noise, target, images = (None if t is None else t[start:stop] for t in (self.noise, self.target, self.images))
        reals = None if self.reals is None else self.reals.part(start, stop)
        return Batch(self.condition[start:stop], noise, target, images, reals)


class Draws:
    """Random numbers for one micro-batch: a slice of those of the whole global batch, so that neither the number of
    processes nor gradient accumulation changes them. Calls must come in the same order in every micro-batch."""

    def __init__(self, seed: int, start: int, count: int, total: int, device: torch.device):
        self.start, self.count, self.total, self.device = start, count, total, device
        self.host = torch.Generator().manual_seed(seed ^ 1)
        self.generator = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal [count, *shape]."""
        return self._mine(torch.randn(self.total, *shape, generator=self.generator, device=self.device))

    def rand(self, *shape: int) -> Tensor:
        """Uniform on [0, 1) [count, *shape]."""
        return self._mine(torch.rand(self.total, *shape, generator=self.generator, device=self.device))

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform integers of {low, ..., high - 1} [count, *shape]."""
        return self._mine(torch.randint(low, high, (self.total, *shape), generator=self.generator, device=self.device))

    def picks(self, high: int) -> list[int]:
        """Uniform integers of {0, ..., high - 1}, `count` of them, drawn by the processor: nothing waits for the
        device."""
        return self._mine(torch.randint(0, high, (self.total,), generator=self.host)).tolist()

    def shared(self, *shape: int) -> Tensor:
        """Uniform on [0, 1) [*shape]: numbers that all samples, micro-batches and processes share."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _mine(self, x: Tensor) -> Tensor:
        return x[self.start : self.start + self.count]


class Loop(Protocol):
    """What the training loop does for every method."""

    def micro_batches(self, batch: Batch, turn: int = 0) -> Iterator[tuple[Batch, Draws]]:
        """The process's share of the global batch, in parts that fit the memory, each with its random numbers: for
        methods that go through the batch several times in an iteration, others in each `turn`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss; all micro-batches and processes together give that of the
        global mean. The processes exchange gradients in `update`, where all have to have those of the same parameters:
        a loss that a process does without is multiplied by 0, not left out."""
        ...

    def update(self, name: str) -> None:
        """Sanitise, clip, optimiser step, zero the gradients of the network of that name. The average of the product
        follows once, after the iteration, however many updates it had."""
        ...

    def frozen(self, name: str) -> AbstractContextManager[nn.Module]:
        """The network of that name with its parameters held fixed (gradients still flow to its inputs)."""
        ...

    def net(self, name: str) -> nn.Module:
        """The network of that name as it is to be called in training."""
        ...

    def mean(self, values: list[Tensor]) -> Tensor:
        """Mean over micro-batches, detached."""
        ...

    def everywhere(self, value: Tensor) -> Tensor:
        """Mean over processes of a detached tensor."""
        ...


class Method(ABC, Generic[O]):
    """A way of training. It never opens files, parses YAML, prints or saves."""

    name: ClassVar[str]  # as recipes have it
    Options: ClassVar[type[Options]] = Options
    data: ClassVar[str] = "images"  # what a batch holds: "pairs", "images" or "none" (see `needs`)
    stored_latents: ClassVar[bool] = False  # whether images may be latents that were stored (`d2o.data.stored_latents`)
    triplets: ClassVar[bool] = False  # whether images are triplets with judgements (`d2o.data.triplets`)
    pools_across: ClassVar[bool] = (
        False  # whether processes can take samples together, if each has few (not micro-batches)
    )
    few_steps: ClassVar[bool] = False  # whether its students may be called several times for a sample (`student.steps`)
    tells: ClassVar[bool] = False  # whether it trains students that are told the guidance scale of their pairs
    takes: ClassVar[str] = (
        ""  # the teachers it distils, one of `d2o.methods.teachers.REFUSES`; "": it learns without one
    )
    product: ClassVar[str] = "student"  # which of players() is the result
    classes: int = 0  # of the images, where it learns from their labels (a plan may not have the images)
    train_indices: Tensor | None = None  # the images that batches are drawn from; None: all

    @classmethod
    def needs(cls, options: O) -> str:
        """What a batch holds under these options: "pairs", "images", or "none": nothing but the teacher is needed,
        labels are drawn."""
        return cls.data

    @classmethod
    def real_share(cls, options: O) -> float:
        """The share of a batch's rows for which real images of `data:` come beside the pairs."""
        return 0.0

    @classmethod
    def micro_multiple(cls, options: O, batch: int) -> int:
        """Micro-batches are of a multiple of so many samples: those of an iteration's `batch` that a loss or a critic
        takes together (see `d2o.training.share.divide`)."""
        return 1

    @classmethod
    def phase(cls, options: O) -> str:
        """As which phase of training (`d2o.metrics.nfe.PER_SAMPLE`) papers count its network evaluations; "": none."""
        return ""

    @abstractmethod
    def __init__(self, setup: Setup[O]): ...

    @abstractmethod
    def players(self) -> dict[str, nn.Module]:
        """The networks that are trained, by name."""

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that its steps only call, by name: never trained, never in a training state."""
        return {}

    def states(self) -> dict[str, nn.Module]:
        """Modules that no optimiser trains and a resumed run needs: a controller, a running mean, a target network."""
        return {}

    @abstractmethod
    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Exactly one iteration of the algorithm; returns scalars for the log (detached tensors, not read here)."""

    def settle(self) -> None:
        """What is done to the networks at the end of an iteration, after the product's average has moved."""

    def heaviest(self) -> int:
        """An iteration whose step takes the most memory, for plans: of a method with phases, one of the last."""
        return 0

    def intervals(self) -> tuple[int, ...]:
        """From one iteration to the next that does what others leave out (a step of a network, a penalty), for plans:
        counted from `heaviest`, which does all of it."""
        return ()

    @abstractmethod
    def describe(self) -> JsonObject:
        """The product's part of a checkpoint's metadata: kind, network, and spec or student where it has one."""

    def spec(self) -> Spec | None:
        """Shape and condition of what the product generates; None if it generates nothing."""
        return None

    def generate(self, product: nn.Module, noise: Tensor, condition: Condition) -> Tensor:
        """Images in [-1, 1] from noise [B, C, H, W] by the product (or its EMA copy)."""
        raise UserError("this method's product generates no images")

    def nfe(self) -> int:
        """Network calls of one generated sample."""
        return 1

    def scales(self) -> Range | None:
        """The guidance scales that the product may be told; None: it is told none."""
        return None

    def optim(self, name: str, options: S) -> S:
        """The optimiser's settings of the network of that name, from the recipe's section for it."""
        return options

    def rate(self, iteration: int) -> float:
        """Factor of the recipe's learning rates in this iteration, for methods in stages that each have a course of
        their own."""
        return 1.0

    def validate(self, product: nn.Module) -> dict[str, float]:
        """Numbers about the product that need no generated images."""
        return {}
