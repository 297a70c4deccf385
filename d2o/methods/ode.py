"""ODE distillation: the student, called once at the highest noise level, regresses to the teacher's ODE solution from
the same noise.

Luhman & Luhman 2021; the first stage of Diffusion2GAN (Kang et al. 2024, eq. 1) with a choice of distances.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.features.base import check_shape
from d2o.features.load import load_features
from d2o.losses.perceptual import perceptual
from d2o.losses.regression import distance, mse
from d2o.methods.base import Batch, Loop, Options, Setup
from d2o.methods.student import StudentMethod
from d2o.methods.teachers import check_teacher


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


class ODE(StudentMethod[ODEOptions]):
    name = "ode"
    Options = ODEOptions
    data = "pairs"
    takes = "edm"
    tells, few_steps = True, True
    continues = ("denoiser", "few_step", "consistency")

    def __init__(self, setup: Setup[ODEOptions]):
        self.options = setup.options
        self.teacher = check_teacher("ode", setup.teacher)
        self.check_latents("loss", self.options.loss, ("perceptual",))
        self.student = self.begin_student(setup, self.teacher.spec)
        self._spec = self.student.spec
        if self.options.loss == "perceptual":
            if self.options.extractor is None:
                raise UserError(
                    "ode.extractor: the perceptual loss needs a feature extractor",
                    "for example `ode.extractor: digits`",
                )
            self.extractor = load_features(self.options.extractor, setup.device)
            check_shape(self.teacher.spec.shape, self.extractor, of="the teacher's samples")

    def frozen(self) -> dict[str, nn.Module]:
        return {"extractor": self.extractor} if self.options.loss == "perceptual" else {}

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """d(G(z, c), x) of eq. 1, per sample."""
        if self.options.loss == "perceptual":
            return perceptual(x, y, self.extractor.maps) + self.options.perceptual_mse * mse(x, y)
        return distance(self.options.loss, x, y, self.options.huber_reduce)

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses = []
        for micro, _ in loop.micro_batches(batch):
            assert micro.noise is not None and micro.target is not None
            x = loop.net("student")(micro.noise, self.asked(micro.condition))
            loss = self.distance(x, micro.target).mean()
            loop.backward(loss)
            losses.append(loss)
        loop.update("student")
        return {"loss": loop.mean(losses)}


METHOD = ODE
