"""Progressive distillation (Salimans & Ho 2022, Algorithm 2), in EDM's noise levels as in Table 5 of Zheng & Yang 2024:
the student's number of steps halves from stage to stage, each learning from the one before."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from d2o.losses import consistency as c
from d2o.methods.base import Batch, Draws, Loop, Setup
from d2o.methods.jumps import JumpMethod, JumpOptions
from d2o.students.consistency import estimate


class PDOptions(JumpOptions):
    weight: Literal["uniform", "inverse_gap", "truncated_snr"] = Field(
        "truncated_snr", description="weight of a sample: 1, 1 / (t - s), or max(1 / t^2, 1)"
    )
    N: int = Field(18, ge=1, description="the student's steps in the first stage")
    final_steps: int = Field(1, ge=1, description="steps at which halving ends; the student's network calls")
    stage_images: int | None = Field(
        None, ge=1, description="images of a stage; those of 2 steps and of 1 are twice as long; it has to be given"
    )
    stage_decay: bool = Field(True, description="let the learning rate fall to 0 in every stage, linearly")
    stage_target: Literal["previous", "student"] = Field(
        "previous",
        description=(
            "who takes the two steps after the first stage: the student of the stage before, or the one in training"
        ),
    )

    @model_validator(mode="after")
    def _halves(self) -> PDOptions:
        ratio = self.N // self.final_steps
        if self.N % self.final_steps or ratio & (ratio - 1):
            what = f"N: {self.N} steps cannot be halved down to {self.final_steps}"
            raise ValueError(f"{what}; N is final_steps times a power of 2")
        if self.stage_images is None:
            raise ValueError("stage_images is missing: pd needs the length of a stage in images")
        return self


class PD(JumpMethod[PDOptions]):
    name = "pd"
    Options = PDOptions
    form = "pd"

    def __init__(self, setup: Setup[PDOptions]):
        super().__init__(setup)
        self.stage = Stage(self.options.N)
        before = self.options.stage_target == "previous"
        self.previous = copy.deepcopy(self.student).requires_grad_(False).eval() if before else None

    def states(self) -> dict[str, nn.Module]:
        return {"stage": self.stage, **({} if self.previous is None else {"previous": self.previous})}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        n, begin, _ = self.stage_of(iteration)
        if iteration == begin:  # a new stage learns from the student as it is now
            self.stage.steps.fill_(n)
            if self.previous is not None:
                self.previous.load_state_dict(self.student.state_dict())
        loss = self.descend(loop, batch, n)
        return {"loss": loss, "N": torch.tensor(float(n), device=self.device)}

    def loss(self, loop: Loop, x: Tensor, condition: Tensor | None, draw: Draws, n: int) -> Tensor:
        """d(f(x_t, t), the estimate that goes in one step where two half steps lead), over n steps (Table 5, PD)."""
        i = draw.randint(1, n + 1)
        t, u, s = self.T(i, n), self.T(i - 0.5, n), self.T(i - 1, n)
        x_t = x + c.column(t, x) * draw.randn(*x.shape[1:])
        with torch.no_grad():
            if n == self.options.N:  # the first stage
                h = self.solve(self.solve(x_t, t, u, condition), u, s, condition)
            else:
                with self.halver(loop) as teacher, self.replayed():
                    h = self.hop(teacher, self.hop(teacher, x_t, t, u, condition), u, s, condition)
        y = estimate(loop.net("student"), self.form, x_t, t, s, condition)
        return self.weighted(t, s) * self.distance(y, c.progressive_target(x_t, h, t, s))

    def halver(self, loop: Loop) -> AbstractContextManager[nn.Module]:
        """Who takes the two half steps of a later stage."""
        return loop.frozen("student") if self.previous is None else nullcontext(self.previous)

    def stage_of(self, iteration: int) -> tuple[int, int, int]:
        """The student's steps now, and the stage's first iteration and length."""
        o = self.options
        assert o.stage_images is not None
        return c.stage(iteration, o.N, o.final_steps, max(o.stage_images // self.batch, 1))

    def rate(self, iteration: int) -> float:
        if not self.options.stage_decay:
            return 1.0
        _, begin, length = self.stage_of(iteration)
        return max(1 - (iteration - begin) / length, 0.0)

    def calls(self) -> int:
        return self.options.final_steps if self.device.type == "meta" else int(self.stage.steps)


class Stage(nn.Module):
    """The steps that the student can do now, kept for runs that are resumed."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(steps))


METHOD = PD
