"""What distillation by jumps along the teacher's ODE has in common (methods cd, pd, ctm): x_t = x + t z for real images
x, and one network call learns to go where small steps of the teacher's solver lead, each as in Table 5 of Zheng & Yang
2024."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.condition import Embedded
from d2o.errors import UserError
from d2o.losses import consistency as c
from d2o.losses.perceptual import load_lpips
from d2o.losses.regression import distance
from d2o.methods.base import Batch, Draws, Loop, Options, Setup
from d2o.methods.student import StudentMethod
from d2o.methods.teachers import check_teacher
from d2o.networks.build import network_config
from d2o.networks.config import Config
from d2o.networks.edm_unet import EDMPrecond
from d2o.networks.edm_view import EDMView, called_at, lowest_level
from d2o.students.base import Student
from d2o.students.consistency import MIDDLE, ConsistencyStudent, estimate
from d2o.teachers.base import Spec, Teacher


class JumpOptions(Options):
    distance: Literal["l2", "l1", "pseudo_huber", "lpips"] = Field(
        "l2", description="distance to the target; lpips: over VGG-16, at 224 x 224"
    )
    huber_reduce: Literal["vector", "element"] = Field(
        "vector", description="pseudo-Huber norm over the whole sample, or value by value"
    )
    lpips_pooling: Literal["avg", "max"] = Field(
        "avg", description="poolings of LPIPS: as Song et al. 2023, or as VGG-16 was trained"
    )
    weight: Literal["uniform", "inverse_gap", "truncated_snr"] = Field(
        "uniform", description="weight of a sample: 1, 1 / (t - u), or max(1 / t^2, 1)"
    )
    N: int = Field(18, ge=1, description="noise levels")
    solver: Literal["heun", "euler"] = Field("heun", description="teacher's solver")
    cfg: float = Field(1.0, ge=0, description="guidance of the teacher's steps (Luo et al. 2023b, LCM); 1: none")
    clamp: bool = Field(
        True,
        description=(
            "the student brings its estimate of the clean image into [-1, 1] at every call, as the sampler of Song et "
            "al. 2023 does; never in latent spaces"
        ),
    )


J = TypeVar("J", bound=JumpOptions)


class JumpMethod(StudentMethod[J]):
    """Trains the network of a `ConsistencyStudent`."""

    data = "images"
    takes = "edm pixel"
    continues = ("denoiser", "consistency")
    form: ClassVar[str]  # of the student
    precond: ClassVar[str] = "edm"  # of its network
    teacher: Teacher

    def __init__(self, setup: Setup[J]):
        if setup.images is None:
            raise UserError(f"method {self.name} needs `data:`")
        self.options, self.device, self.batch = setup.options, setup.device, setup.batch
        self.teacher = check_teacher(self.name, setup.teacher)
        self.check_latents("distance", self.options.distance, ("lpips",))
        self._spec = self.teacher.spec
        self.sigma = called_at(self.teacher.network, float(setup.student.sigma))
        self.lowest = lowest_level(self.teacher.network)
        self.check_guidance("cfg", self.options.cfg)
        self.check_images(setup, self._spec)
        self.student = self.begin(setup, self._spec)
        pooling = self.options.lpips_pooling
        self.lpips = load_lpips(self.device, pooling=pooling) if self.options.distance == "lpips" else None

    def check_images(self, setup: Setup[J], spec: Spec) -> None:
        """UserError: they are not what the teacher makes."""
        images = setup.images
        assert images is not None
        wanted = self.teacher.space.image_shape(spec.shape)
        if tuple(images.shape) != wanted:
            have, want = (" x ".join(map(str, shape)) for shape in (images.shape, wanted))
            raise UserError(
                f"the images are of {have}, those of teacher {spec.name!r} of {want}",
                "data.resolution and data.channels make them fit",
            )
        if images.classes < spec.classes and self.device.type != "meta":
            have = f"{images.classes} classes" if images.classes else "none"
            raise UserError(f"teacher {spec.name!r} has {spec.classes} classes, and the images have {have}")

    def begin(self, setup: Setup[J], spec: Spec, own: Config | None = None) -> nn.Module:
        network = super().begin(setup, spec, own)
        network.precond = network_config(network)["precond"] = self.precond  # type: ignore[assignment]
        return network

    def check_start(self, setup: Setup[J], start: Student, spec: Spec) -> None:
        super().check_start(setup, start, spec)
        if not isinstance(start.network, (EDMPrecond, EDMView)):
            raise UserError(f"the student to start from is not one that teacher {spec.name!r} could teach")

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def frozen(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher.network, **({} if self.lpips is None else {"lpips": self.lpips})}

    # Parts of a step --------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, loop: Loop, x: Tensor, embedded: Embedded, draw: Draws, n: int) -> Tensor:
        """Losses [B] of images x on a grid of n steps."""

    def descend(self, loop: Loop, batch: Batch, n: int) -> Tensor:
        """One step of the student. Returns its mean loss."""
        losses = []
        for micro, draw in loop.micro_batches(batch):
            x = self.reals(micro, draw)
            loss = self.loss(loop, x, self.embedded(self.condition_of(micro)), draw, n).mean()
            loop.backward(loss)
            losses.append(loss)
        loop.update("student")
        return loop.mean(losses)

    def T(self, i: Tensor, n: int) -> Tensor:
        """Noise level i of 0 .. n, from sigma_min to the student's."""
        return c.karras_time(i, n, self.lowest, self.sigma)

    def solve(self, x: Tensor, t: Tensor, u: Tensor, embedded: Embedded) -> Tensor:
        """One step of the teacher's solver."""
        cfg = self.options.cfg
        return c.SOLVERS[self.options.solver](lambda y, level: self.teacher.guided(y, level, embedded, cfg), x, t, u)

    def hop(self, network: nn.Module, x: Tensor, t: Tensor, s: Tensor, embedded: Embedded) -> Tensor:
        """F(x_t, t, s) by that network."""
        return c.jump(x, estimate(network, self.form, x, t, s, embedded), t, s)

    def replayed(self) -> AbstractContextManager[None]:
        """Random numbers drawn inside (dropout) are drawn again after: both forward passes leave out the same
        values."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return distance(self.options.distance, x, y, self.options.huber_reduce, self.lpips)

    def weighted(self, t: Tensor, u: Tensor) -> Tensor:
        return c.weight(self.options.weight, t, u).float()

    # The product ------------------------------------------------------------------------------------------------------

    def made(self, product: nn.Module) -> ConsistencyStudent:
        calls, middle = self.calls(), getattr(self.options, "middle", MIDDLE)
        return ConsistencyStudent(product, self._spec, self.sigma, self.form, calls, middle, self.options.clamp)

    def calls(self) -> int:
        """Network calls of an image."""
        return 1
