"""ODE distillation: the student, called once at the highest noise level, regresses to the teacher's ODE solution from
the same noise.

Luhman & Luhman 2021; the first stage of Diffusion2GAN (Kang et al. 2024, eq. 1) with a choice of distances.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from d2o.condition import Condition
from d2o.errors import UserError
from d2o.features.base import check_shape
from d2o.features.load import load_features
from d2o.losses.perceptual import perceptual
from d2o.losses.regression import LOSSES, pseudo_huber
from d2o.methods.base import Batch, Loop, Method, Options, Setup
from d2o.methods.teachers import check_teacher
from d2o.networks.build import build_network, network_config, set_dropout
from d2o.students.base import Student
from d2o.teachers.base import Spec


class ODEOptions(Options):
    loss: Literal["mse", "l1", "pseudo_huber", "perceptual"] = Field(
        "pseudo_huber", description="distance to the teacher's output"
    )
    huber_reduce: Literal["vector", "element"] = Field(
        "vector", description="pseudo-Huber norm over the whole sample, or value by value"
    )
    extractor: str | None = Field(None, description="feature extractor of the perceptual loss (name or path)")
    perceptual_mse: float = Field(
        0.1, ge=0, description="weight of the mean squared error that is added to the perceptual loss"
    )


class ODE(Method):
    Options = ODEOptions
    data = "pairs"
    takes = "edm"
    product = "student"

    def __init__(self, setup: Setup):
        self.options: ODEOptions = setup.options
        teacher = check_teacher("ode", setup.teacher)
        if setup.start is not None:
            self.student = copy.deepcopy(setup.start)
            if self.student.spec.shape != teacher.spec.shape or self.student.spec.classes != teacher.spec.classes:
                theirs = f"{self.student.spec.shape} with {self.student.spec.classes} classes"
                raise UserError(f"the student to start from makes {theirs}, teacher {teacher.spec.name!r} other images")
        else:
            scratch = {**network_config(teacher.network), **(setup.network or {})}
            network = copy.deepcopy(teacher.network) if setup.student.init == "teacher" else build_network(scratch)
            if setup.student.dropout is not None:
                set_dropout(network, setup.student.dropout)
            self.student = Student(network, teacher.spec, setup.student.sigma)
        self.student.requires_grad_(True).train()
        if self.options.loss == "perceptual":
            if self.options.extractor is None:
                raise UserError(
                    "ode.extractor: the perceptual loss needs a feature extractor",
                    "for example `ode.extractor: digits`",
                )
            self.extractor = load_features(self.options.extractor, setup.device)
            check_shape(teacher.spec.shape, self.extractor, of="the teacher's samples")

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """d(G(z, c), x) of eq. 1, per sample."""
        if self.options.loss == "perceptual":
            return perceptual(x, y, self.extractor.maps) + self.options.perceptual_mse * LOSSES["mse"](x, y)
        if self.options.loss == "pseudo_huber":
            return pseudo_huber(x, y, self.options.huber_reduce)
        return LOSSES[self.options.loss](x, y)

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses = []
        for micro, _ in loop.micro_batches(batch):
            assert micro.noise is not None and micro.target is not None
            x = loop.net("student")(micro.noise, micro.condition)
            loss = self.distance(x, micro.target).mean()
            loop.backward(loss)
            losses.append(loss)
        loop.update("student")
        return {"loss": loop.mean(losses)}

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "student",
            "network": network_config(self.student.network),
            "spec": self.student.spec,
            "student": {"kind": "denoiser", "sigma": self.student.sigma},
        }

    def spec(self) -> Spec:
        return self.student.spec

    def generate(self, product: nn.Module, noise: Tensor, condition: Condition) -> Tensor:
        return self.student.decode(product(noise, condition))


METHOD = ODE
