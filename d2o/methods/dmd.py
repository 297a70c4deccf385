"""Distribution matching: DMD (Yin et al. 2024, algorithms 1 to 3), DMD2 (Yin et al. 2024b) and Diff-Instruct (Luo et
al. 2023, algorithm 1), with two sets of defaults.

A score network, begun as a copy of the teacher, learns the denoiser of the student's own samples. Where it and the
teacher disagree about a noisy sample, the student moves the sample towards the teacher's image: the gradient of the
reverse KL divergence. DMD also keeps the student near the teacher's ODE solutions (`lambda_reg`), for which it needs
pairs; without that term the method needs no data at all. DMD2 leaves the pairs away, lets the score network make
several steps for one of the student (`student_every`) and has it tell real images from the student's (`adversarial`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.condition import Condition, Embedded
from d2o.critics.bottleneck import BottleneckCritic
from d2o.diffusion.schedules import karras_sigma
from d2o.errors import UserError
from d2o.features.base import Features, check_shape
from d2o.features.load import load_features
from d2o.losses.adversarial import critic_loss, generator_loss
from d2o.losses.distribution import LEVELS, index_sigma, matching_gradient, per_sample, surrogate
from d2o.losses.perceptual import LPIPS, load_lpips, perceptual
from d2o.losses.regression import LOSSES, lpips
from d2o.losses.score import denoising_loss, lognormal_sigma
from d2o.methods.base import Batch, Draws, Loop, Options, Setup
from d2o.methods.score_networks import (
    ScoreMethod,
    check_real_images,
    evaluating,
    has_uncertainty,
    labels_of_images,
    look,
    note,
)
from d2o.methods.teachers import check_teacher
from d2o.networks.edm2_unet import keep_normalised
from d2o.networks.precond import set_disc_map
from d2o.teachers.base import Spec

LevelChoice = Literal["karras_index", "karras_uniform", "lognormal"]

KINDS: dict[str, dict[str, Any]] = {
    "dmd": {
        "t_dist": "karras_index",
        "score_t_dist": "karras_index",
        "weight": "l1_teacher",
        "order": "generator_first",
        "samples": "same",
        "reduce": "mean",
    },
    "diff_instruct": {
        "t_dist": "lognormal",
        "score_t_dist": "lognormal",
        "weight": "none",
        "order": "score_first",
        "samples": "fresh",
        "reduce": "sum",
    },
}
"""What the options that a recipe leaves away are, as the two papers' authors train."""


class DMDOptions(Options):
    kind: Literal["dmd", "diff_instruct"] = Field(
        "dmd", description="the paper that the options below follow where they are null"
    )
    t_dist: LevelChoice | None = Field(
        None, description="noise levels at which samples are compared; null: karras_index, diff_instruct lognormal"
    )
    t_index: tuple[int, int] = Field(
        (20, 980), description="karras_index: the lowest and the highest of the levels 0 to 999, both included"
    )
    t_range: tuple[float, float] = Field(
        (0.02, 0.98), description="karras_uniform: part of [0, 1], from the lowest level to the highest"
    )
    p_mean: float = Field(-1.2, description="lognormal: mean of ln sigma, of both networks' levels")
    p_std: float = Field(1.2, gt=0, description="lognormal: standard deviation of ln sigma")
    weight: Literal["l1_teacher", "none"] | None = Field(
        None,
        description=(
            "divide each sample's gradient by its mean |x - D_teacher|, or not; null: l1_teacher, diff_instruct none"
        ),
    )
    cfg: float = Field(
        1.0, ge=0, description="guidance of the teacher where samples are compared (DMD of Stable Diffusion: 3, 8)"
    )
    reduce: Literal["mean", "sum"] | None = Field(
        None, description="both losses over the values of a sample; null: mean, diff_instruct sum"
    )
    order: Literal["generator_first", "score_first"] | None = Field(
        None, description="whose step comes first in an iteration; null: generator_first, diff_instruct score_first"
    )
    samples: Literal["same", "fresh"] | None = Field(
        None,
        description=(
            "the (first) step of the score network learns from the student's samples of that iteration, or new ones;"
            " null: by kind"
        ),
    )
    score_t_dist: LevelChoice | None = Field(
        None,
        description=(
            "noise levels of the score network's loss, the whole range of them; null: karras_index, diff_instruct"
            " lognormal"
        ),
    )
    score_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout of the score network while it is trained; null: the teacher's"
    )
    augment: float = Field(
        0.0, ge=0, le=1, description="probability of EDM's augmentations in the score network's training; 0: none"
    )
    score_steps: int = Field(
        1,
        ge=1,
        description="steps of the score network in an iteration, on one batch; all but the first take new samples",
    )
    student_every: int = Field(
        1, ge=1, description="the student makes a step once in so many iterations (DMD2's two time scales: 5)"
    )
    adversarial: bool = Field(
        False,
        description=(
            "a head on the score network's bottleneck tells real images from the student's, at all noise levels (DMD2);"
            " needs `data:`"
        ),
    )
    lambda_adv: float = Field(3e-3, ge=0, description="weight of the student's adversarial loss")
    lambda_d: float = Field(1e-2, ge=0, description="weight of the head's loss, beside the score network's own")
    dropout: Literal["off", "shared"] = Field(
        "off",
        description=(
            "dropout of teacher and score network in the student's step: none, or the same masks in both"
            " (Diff-Instruct's code)"
        ),
    )
    lambda_kl: float = Field(
        1.0,
        ge=0,
        description="weight of the matching gradient; 0: regression alone, no score network (DMD without KL)",
    )
    lambda_reg: float = Field(
        0.0,
        ge=0,
        description="weight of the distance to the teacher's ODE solutions (DMD: 0.25); above 0 it needs `pairs:`",
    )
    regression: Literal["lpips", "perceptual", "l1", "mse"] = Field(
        "lpips", description="that distance; lpips: VGG's, at 224 px as in the paper; perceptual: of an own classifier"
    )
    extractor: str | None = Field(None, description="feature extractor of the perceptual distance (name or path)")

    def filled(self) -> DMDOptions:
        """With what the kind says in place of null."""
        return self.model_copy(
            update={key: value for key, value in KINDS[self.kind].items() if getattr(self, key) is None}
        )


class Made(NamedTuple):
    """Samples of the student, detached, and what they were asked to be."""

    x: Tensor
    embedded: Embedded


class DMD(ScoreMethod[DMDOptions]):
    name = "dmd"
    Options = DMDOptions
    data = "none"
    at_sigma_max = True

    @classmethod
    def needs(cls, options: DMDOptions) -> str:
        return "pairs" if options.lambda_reg > 0 else "images" if options.adversarial else "none"

    def __init__(self, setup: Setup[DMDOptions]):
        self.options = checked_options(setup.options.filled())
        self.teacher = check_teacher("dmd", setup.teacher)
        self.check_guidance("cfg", self.options.cfg)
        if self.options.lambda_reg:
            self.check_latents("regression", self.options.regression, ("lpips", "perceptual"))
        self.student = self.begin_student(setup, self.teacher.spec)
        self._spec = self.student.spec
        if self.options.lambda_kl:
            self.score = self.begin_score(self.options.score_dropout)
            self.uncertain = has_uncertainty(self.score)
            self.check_augment(self.options.augment)
        self.critic = self.begin_critic(setup) if self.options.adversarial else None
        asked = self.options.lambda_reg > 0
        self.judge = regression_network(self.options, self.teacher.spec, setup.device) if asked else None

    def begin_critic(self, setup: Setup[DMDOptions]) -> BottleneckCritic:
        """The score network with its head. UserError: no real images, or others than the teacher's."""
        check_real_images(setup, self.teacher)
        labels_of_images("dmd", setup, self.teacher.spec)
        set_disc_map(self.score, "enc_last")
        spec, device = self.teacher.spec, next(self.score.parameters()).device
        asked = Condition.of_prompts([""]) if spec.condition == "text" else Condition.none(1)
        asked = Condition.of_labels([0]) if spec.classes else asked
        with evaluating(self.score), torch.no_grad():
            one = torch.ones(1, 1, 1, 1, device=device)
            features = look(self.score, one.expand(1, *spec.shape), one, self.embedded(asked), "encoder")[1]
        return BottleneckCritic(self.score, tuple(features.shape[1:])).to(device).train()

    def players(self) -> dict[str, nn.Module]:
        if not self.options.lambda_kl:
            return {"student": self.student}
        return super().players() if self.critic is None else {"student": self.student, "score": self.critic}

    def frozen(self) -> dict[str, nn.Module]:
        return {**super().frozen(), **({} if self.judge is None else {"regression": self.judge})}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        log: dict[str, list[Tensor]] = {}
        made: list[Made] = []
        if not self.options.lambda_kl:
            self.regression_step(loop, batch, log)
            return {"loss": loop.mean(log["loss"])}
        turn = iteration % self.options.student_every == 0
        if turn and self.options.order == "generator_first":
            made = self.generator_step(loop, batch, log)
        for k in range(self.options.score_steps):
            same = turn and k == 0 and self.options.samples == "same"
            self.score_step(loop, batch, 1 + k, made if same else None, log)
        if turn and self.options.order == "score_first":
            self.generator_step(loop, batch, log)
        return {key: loop.mean(values) for key, values in log.items()}

    def generator_step(self, loop: Loop, batch: Batch, log: dict[str, list[Tensor]]) -> list[Made]:
        """One step of the student: matching, and regression if it is asked for. Returns the samples that were
        matched."""
        made = []
        for micro, draw in loop.micro_batches(batch):
            z, condition = draw.randn(*self._spec.shape), self.draw_condition(draw)
            x, reference = self.call_student(loop, z, condition, micro)
            embedded = self.embedded(condition)
            sigma = self.sigma(draw, self.options.t_dist, self.options.t_index, self.options.t_range)
            x_t = x.detach() + sigma * draw.randn(*x.shape[1:])
            with loop.frozen("score") as score, torch.no_grad():
                real, fake = self.both(score, x_t, sigma.flatten(), embedded)
            gradient = matching_gradient(x, real, fake, str(self.options.weight))
            loss = surrogate(x, gradient, str(self.options.reduce)).mean()
            note(log, loss=loss)
            loss = self.options.lambda_kl * loss
            if self.critic is not None:
                with loop.frozen("score") as critic, evaluating(critic):
                    paid = generator_loss(self.logits(critic, x, embedded, draw)).mean()
                note(log, loss_adv=paid)
                loss = loss + self.options.lambda_adv * paid
            if reference is not None:
                assert micro.target is not None
                regression = self.distance(reference, micro.target).mean()
                note(log, loss_reg=regression)
                loss = loss + self.options.lambda_reg * regression
            loop.backward(loss)
            made.append(Made(x.detach(), embedded))
        loop.update("student")
        return made

    def regression_step(self, loop: Loop, batch: Batch, log: dict[str, list[Tensor]]) -> None:
        """One step of the student by the pairs alone (Yin et al. 2024, the ablation without the KL term)."""
        for micro, _ in loop.micro_batches(batch):
            assert micro.noise is not None and micro.target is not None
            x = loop.net("student")(micro.noise, self.embedded(micro.condition))
            loss = self.options.lambda_reg * self.distance(x, micro.target).mean()
            note(log, loss=loss)
            loop.backward(loss)
        loop.update("student")

    def intervals(self) -> tuple[int, ...]:
        return (self.options.student_every,)

    def settle(self) -> None:
        keep_normalised(self.student.network)

    def score_step(
        self, loop: Loop, batch: Batch, turn: int, made: list[Made] | None, log: dict[str, list[Tensor]]
    ) -> None:
        """One step of the score network: denoising of the student's samples, given or new ones; DMD2's tells them from
        real ones, too."""
        for i, (micro, draw) in enumerate(loop.micro_batches(batch, turn)):
            x, embedded = fake, _ = self.new_samples(draw) if made is None else made[i]
            asked: dict[str, Any] = {"return_logvar": True} if self.uncertain else {}
            if self.options.augment:
                x, asked["augment_labels"] = self.augmented(x, self.options.augment, draw)
            sigma = self.sigma(draw, self.options.score_t_dist, (0, LEVELS - 1), (0.0, 1.0))
            found = loop.net("score")(x + sigma * draw.randn(*x.shape[1:]), sigma.flatten(), embedded, **asked)
            denoised, logvar = found if self.uncertain else (found, None)
            loss = per_sample(
                denoising_loss(denoised, x, sigma, self.score.sigma_data, logvar), str(self.options.reduce)
            ).mean()
            note(log, loss_score=loss)
            if self.critic is not None:
                logits_fake = self.logits(loop.net("score"), fake, embedded, draw)
                own = self.embedded(self.condition_of(micro))
                logits_real = self.logits(loop.net("score"), self.reals(micro, draw), own, draw)
                loss_d = critic_loss(logits_real, logits_fake).mean()
                note(log, loss_d=loss_d, logit_real=logits_real.mean(), logit_fake=logits_fake.mean())
                loss = loss + self.options.lambda_d * loss_d
            loop.backward(loss)
        loop.update("score")
        keep_normalised(self.score)

    def logits(self, critic: nn.Module, x: Tensor, embedded: Embedded, draw: Draws) -> Tensor:
        """What the critic says of x at noise levels of its own, all of them [B]."""
        sigma = index_sigma(draw.randint(0, LEVELS, 1, 1, 1), self._spec.sigma_min, self._spec.sigma_max)
        return critic(x + sigma * draw.randn(*x.shape[1:]), sigma.flatten(), embedded, part="encoder")

    def call_student(self, loop: Loop, z: Tensor, condition: Condition, micro: Batch) -> tuple[Tensor, Tensor | None]:
        """Samples from z, and from the pairs' noise where there are pairs: one call of the network for both."""
        student = loop.net("student")
        if not self.options.lambda_reg:
            return student(z, self.embedded(condition)), None
        assert micro.noise is not None
        both = self.embedded(Condition.join([condition, micro.condition]))
        x, reference = student(torch.cat([z, micro.noise]), both).split([len(z), len(micro.noise)])
        return x, reference

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Of eq. 9, between samples [B, C, H, W], per sample."""
        if isinstance(self.judge, Features):
            return perceptual(x, y, self.judge.maps)
        return LOSSES[self.options.regression](x, y) if self.judge is None else lpips(x, y, self.judge)

    def new_samples(self, draw: Draws) -> Made:
        z, embedded = draw.randn(*self._spec.shape), self.embedded(self.draw_condition(draw))
        with evaluating(self.student), torch.no_grad():
            return Made(self.student(z, embedded), embedded)

    def sigma(self, draw: Draws, levels: str | None, index: tuple[int, int], part: tuple[float, float]) -> Tensor:
        """A noise level for each sample, [B, 1, 1, 1]."""
        low, high = self._spec.sigma_min, self._spec.sigma_max
        if levels == "lognormal":
            return lognormal_sigma(draw.randn(1, 1, 1), self.options.p_mean, self.options.p_std)
        if levels == "karras_uniform":
            return karras_sigma(1 - (part[0] + (part[1] - part[0]) * draw.rand(1, 1, 1)), low, high)
        return index_sigma(draw.randint(index[0], index[1] + 1, 1, 1, 1), low, high)

    def both(self, score: nn.Module, x_t: Tensor, sigma: Tensor, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """D_teacher and D_score at x_t."""
        if self.options.dropout == "off":
            with evaluating(score):
                return self.teacher.guided(x_t, sigma, embedded, self.options.cfg), score(x_t, sigma, embedded)
        network = self.teacher.network.train()
        try:
            with torch.random.fork_rng([x_t.device] if x_t.device.type == "cuda" else []):
                real = self.teacher.guided(x_t, sigma, embedded, self.options.cfg)
            return real, score(x_t, sigma, embedded)  # with the random numbers that the teacher had
        finally:
            network.eval()


def checked_options(options: DMDOptions) -> DMDOptions:
    """The options if they fit together. UserError otherwise."""
    low, high = options.t_index
    if not 0 <= low <= high < LEVELS:
        raise UserError(f"dmd.t_index: [{low}, {high}] is no range of the levels 0 to {LEVELS - 1}")
    if not 0 <= options.t_range[0] <= options.t_range[1] <= 1:
        raise UserError(f"dmd.t_range: [{options.t_range[0]:g}, {options.t_range[1]:g}] is no part of [0, 1]")
    if options.samples == "same" and options.order == "score_first":
        what = "dmd.samples: with order score_first there are no samples yet for the score network"
        raise UserError(what, "set samples: fresh")
    if options.adversarial and (options.lambda_reg or not options.lambda_kl):
        what = "dmd.adversarial: its critic is the score network, and a batch holds real images or pairs, not both"
        raise UserError(what, "set dmd.lambda_reg: 0 and dmd.lambda_kl above 0, or leave dmd.adversarial away")
    if not options.lambda_kl and not options.lambda_reg:
        raise UserError("dmd.lambda_kl: 0, and dmd.lambda_reg too: the student would learn nothing", "set one above 0")
    if options.lambda_reg and options.regression == "perceptual" and options.extractor is None:
        what = "dmd.extractor: the perceptual distance needs a feature extractor"
        raise UserError(what, "for example `dmd.extractor: digits`")
    return options


def regression_network(options: DMDOptions, spec: Spec, device: torch.device) -> Features | LPIPS | None:
    """The network that the distance of eq. 9 looks through, if any. UserError: an unknown extractor, one that does not
    take samples of that spec, weights that are not there."""
    if options.regression == "perceptual":
        features = load_features(str(options.extractor), device)
        check_shape(spec.shape, features, of="the teacher's samples")
        return features
    return load_lpips(device) if options.regression == "lpips" else None


METHOD = DMD
