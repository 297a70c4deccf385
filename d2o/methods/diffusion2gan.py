"""Diffusion2GAN (Kang et al. 2024, arXiv 2405.05967): a one-step student of pairs, in two stages.

Stage 1 (`lambda_gan: 0`, `d2o train`) regresses to the teacher's ODE solutions by a perceptual distance (eq. 1 and 3).
Stage 2 (`lambda_gan` above 0, `d2o finetune --from` the first one's run) goes on with that and a conditional GAN, whose
critic is the teacher's U-Net and whose real samples are the teacher's (eq. 4 to 6). No real image is used, unless
`real_data` says so.

The paper leaves much open. Each choice is an option, whose default is what its numbers agree with best.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.condition import Asked, Guided
from d2o.critics.unet import UNetCritic
from d2o.diffusion.levels import DiscreteLevels
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError
from d2o.losses.logit_maps import (
    critic_loss_of_maps,
    generator_loss_of_maps,
    one_sample,
    r1_of_maps,
    r1_weight,
    twice_differentiable,
)
from d2o.losses.mismatch import (
    Fakes,
    Fractions,
    Noise,
    check_fractions,
    draw_critic_noise,
    mix_and_match,
    noised,
)
from d2o.methods.base import Batch, Draws, Loop, Options, Setup
from d2o.methods.output_distance import DistanceOptions, OutputDistance
from d2o.methods.real_rows import RealDataOptions, RealRows
from d2o.methods.student import StudentMethod
from d2o.methods.teachers import check_teacher
from d2o.networks.edm_view import EDMView
from d2o.networks.full_precision import keep_head

Losses = dict[str, list[Tensor]]


class CriticOptions(Options):
    """`critic:`, arguments of `UNetCritic`."""

    z: Literal["after_conv_in", "before_conv_in", "none"] = Field(
        "after_conv_in",
        description=(
            "a convolution of the noise z, 0 at first, is added after the input convolution (as if that had channels"
            " for z), before it, or nowhere"
        ),
    )
    inputs: Literal["3x3", "1x1", "none"] = Field(
        "3x3", description="convolutions of the resized sample that every further level of the encoder is given"
    )
    resize: Literal["area", "bicubic"] = Field("area", description="how the sample is resized for them")
    inputs_zero: bool = Field(True, description="they begin at 0")
    inputs_with_z: bool = Field(False, description="they see z as well")
    heads: Literal["multi", "final", "final_mean"] = Field(
        "multi",
        description=(
            "logits of three tensors of every scale of the decoder; by a new convolution of the last; or the mean of"
            " the network's own output (Table 2's rows before multi-scale)"
        ),
    )
    per: Literal["scale", "resnet"] = Field("scale", description="those three of each scale, or of each residual block")
    combined: Literal["output", "concat"] = Field(
        "output", description="the third of them: the scale's output, or skip and what comes from below side by side"
    )
    head: Literal["1x1", "3x3"] = Field("1x1", description="convolutions that make logits (SDXL's printed size: 3x3)")
    head_norm: bool = Field(False, description="group normalisation and SiLU before them")
    keep_output: bool = Field(True, description="the network's output convolution stays, though nothing reads it")
    told: bool = Field(
        True,
        description=(
            "it is told the guidance scale of its samples, as the student is, by an input that begins at 0 (where each"
            " pair has its own: `pairs.cfg: [1, 8]`)"
        ),
    )
    t: float | Literal["random"] | None = Field(
        None,
        description=(
            "time that the critic is told of clean samples (0 to 999; EDM: sigma); null: that of no noise; random: one"
            " drawn for each row, the same for its real and its fake sample (0 to 999, equally likely; EDM: log-uniform"
            " between the teacher's lowest and highest sigma)"
        ),
    )


class R1Options(Options):
    """`r1:`, the gradient penalty of real samples."""

    gamma: float = Field(0.01, ge=0, description="its strength; 0: none (SDXL)")
    interval: int = Field(16, ge=1, description="iterations from one to the next")
    half: bool = Field(True, description="gamma / 2 |grad D|^2, or gamma |grad D|^2")
    lazy_gain: bool = Field(True, description="times the interval")
    of: Literal["x", "xz"] = Field("x", description="gradient by the sample, or by its noise as well")


class MixOptions(Options):
    """`mix:`, mix-and-match: mismatched samples among the fake ones."""

    latent: float = Field(0.25 / 3, ge=0, le=1, description="share with the sample of another row")
    text: float = Field(0.25 / 3, ge=0, le=1, description="share with the condition of another row")
    noise: float = Field(0.25 / 3, ge=0, le=1, description="share with the noise of another row")
    base: Literal["real", "generated"] = Field(
        "real", description="the samples of which condition or noise are exchanged"
    )
    group: int = Field(2, ge=1, description="rows in a row among which the other one is; micro-batches are multiples")

    @property
    def fractions(self) -> Fractions:
        return Fractions(self.latent, self.text, self.noise)

    @property
    def together(self) -> int:
        return self.group if sum(self.fractions) else 1


class NoiseOptions(Options):
    """`noise:`, noise ahead of the critic."""

    enable: bool = Field(False, description="real and fake samples are noised (SDXL), and the critic is told the time")
    t_range: tuple[int, int] = Field((0, 999), description="time steps of it, both ends included, equally likely")
    shared: bool = Field(True, description="the real and the fake sample of a row have the same time and noise")


class Diffusion2GANOptions(Options):
    distance: DistanceOptions = Field(
        DistanceOptions.model_validate({}), description="distance to the teacher's output"
    )
    lambda_distance: float = Field(1.0, ge=0, description="weight of that distance")
    lambda_gan: float = Field(0.0, ge=0, description="weight of the GAN loss; 0: stage 1 (SD: 0.25, SDXL: 1)")
    critic: CriticOptions = Field(
        CriticOptions.model_validate({}), description="the critic, a copy of the teacher's network"
    )
    head_reduce: Literal["mean", "sum"] = Field("mean", description="losses over the critic's maps")
    r1: R1Options = Field(R1Options.model_validate({}), description="R1 on one sample of the batch")
    mix: MixOptions = Field(MixOptions.model_validate({}), description="mix-and-match, in the critic's step alone")
    noise: NoiseOptions = Field(NoiseOptions.model_validate({}), description="noise ahead of the critic")
    real_data: RealDataOptions = Field(
        RealDataOptions.model_validate({}), description="real images among the critic's real samples (not in the paper)"
    )
    order: Literal["critic_first", "generator_first"] = Field(
        "critic_first", description="whose step comes first in an iteration"
    )
    passes: Literal["fresh", "reuse"] = Field(
        "fresh",
        description=(
            "samples of an iteration's second step: made anew by the student (5 network evaluations a sample in all),"
            " or those of the first step (4; a student of generator_first has moved on since; critic_first keeps what"
            " the gradients of all micro-batches need until the student's step)"
        ),
    )
    start: Literal["ema", "raw"] = Field(
        "ema",
        description=(
            "what `d2o finetune --from` begins with: the average of the other run's weights (its checkpoints), or the"
            " weights themselves (its state.safetensors, as it was last saved)"
        ),
    )
    fp32_head: bool = Field(
        True,
        description=(
            "the student's output convolution in full precision, as its rounding is multiplied by sigma (diffusers)"
        ),
    )


class Diffusion2GAN(StudentMethod[Diffusion2GANOptions]):
    name = "diffusion2gan"
    Options = Diffusion2GANOptions
    data = "pairs"
    takes = "edm"
    tells, few_steps = True, True
    continues = ("denoiser", "few_step")

    def __init__(self, setup: Setup[Diffusion2GANOptions]):
        self.options = o = setup.options
        self.teacher = check_teacher(self.name, setup.teacher)
        if o.real_data.share and not o.lambda_gan:
            raise UserError(
                f"{self.name}.real_data.share: real images are for the critic, and lambda_gan: 0 trains without one"
            )
        if not o.lambda_distance and not o.lambda_gan:
            raise UserError(f"{self.name}: lambda_distance and lambda_gan are both 0, so that nothing is learned")
        if o.critic.t == "random" and o.noise.enable:
            raise UserError(
                f"{self.name}.critic.t: random is for clean samples; with noise.enable it is told that of the noise",
                f"{self.name}.critic.t: null",
            )
        if o.passes == "reuse" and o.real_data.share:
            raise UserError(
                f"{self.name}.passes: with real_data the critic's samples are of other noises and conditions than those"
                " of the student's step, and cannot be reused",
                f"{self.name}.passes: fresh",
            )
        self.student = self.begin_student(setup, self.teacher.spec)
        self._spec = self.student.spec
        if o.fp32_head:
            keep_head(self.student.network)
        self.distance = OutputDistance(o.distance, self.teacher, setup.device, f"{self.name}.distance")
        self.critic: UNetCritic | None = None
        if o.lambda_gan:
            check_fractions(o.mix.fractions, o.critic.z != "none")
            self.schedule = critic_schedule(self.teacher.network, o.noise) if o.noise.enable else None
            self.real_rows = RealRows(self.name, o.real_data, setup, self.teacher) if o.real_data.share else None
            told = o.critic.told and self.student.guidance is not None
            t = None if o.critic.t == "random" else o.critic.t
            self.critic = UNetCritic.of(self.teacher.network, told, **o.critic.model_dump(exclude={"told", "t"}), t=t)

    @classmethod
    def micro_multiple(cls, options: Diffusion2GANOptions, batch: int) -> int:
        return options.mix.together if options.lambda_gan else 1

    @classmethod
    def real_share(cls, options: Diffusion2GANOptions) -> float:
        return options.real_data.share

    @classmethod
    def phase(cls, options: Diffusion2GANOptions) -> str:
        if not options.lambda_gan:
            return "regression"
        return "adversarial_reuse" if options.passes == "reuse" else "adversarial"

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student, **({} if self.critic is None else {"critic": self.critic})}

    def frozen(self) -> dict[str, nn.Module]:
        return {} if self.distance.network is None else {"distance": self.distance.network}

    def intervals(self) -> tuple[int, ...]:
        return (self.options.r1.interval,) if self.critic is not None and self.options.r1.gamma else ()

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        log: Losses = {"loss": []}
        shared = Shared([], [])
        if self.critic is not None and self.options.order == "critic_first":
            self.critic_step(loop, batch, iteration, shared, log)
        self.generator_step(loop, batch, shared, log)
        if self.critic is not None and self.options.order == "generator_first":
            self.critic_step(loop, batch, iteration, shared, log)
        return {key: loop.mean(values) for key, values in log.items()}

    def generator_step(self, loop: Loop, batch: Batch, shared: Shared, log: Losses) -> None:
        """d(G(z, c), x) + lambda_GAN softplus(-D(c, z, G(z, c))) (eq. 4 and 6)."""
        o = self.options
        for i, (micro, draw) in enumerate(loop.micro_batches(batch)):
            z, target, c = self.rows(micro, i, shared)
            draws = self.distance.draw(draw)
            x = self.student_makes(loop, z, c, i, shared)
            loss = self.distance(x, target, draws).mean()
            log["loss"].append(loss)
            if self.critic is None:
                loop.backward(o.lambda_distance * loss)
                continue
            noise = self.draw_noise(draw)
            t = self.told_time(noise, draw)
            with loop.frozen("critic") as critic:
                logits = critic(self.shown(x, noise), z, self.judged(c), t)
                gan = generator_loss_of_maps(logits, o.head_reduce).mean()
                log.setdefault("loss_gan", []).append(gan)
                loop.backward(o.lambda_distance * loss + o.lambda_gan * gan)
        loop.update("student")

    def critic_step(self, loop: Loop, batch: Batch, iteration: int, shared: Shared, log: Losses) -> None:
        """softplus(-D(c, z, x)) + softplus(D(fake)), fake what the student makes, or a mismatch; every `r1.interval`
        iterations R1 of the first row of the batch."""
        o, critic = self.options, loop.net("critic")
        for i, (micro, draw) in enumerate(loop.micro_batches(batch, 1)):
            z, target, c = self.rows(micro, i, shared)
            if self.real_rows is not None:
                z, target, c = self.real_rows.put(micro, z, target, c, draw)
            with torch.set_grad_enabled(o.passes == "reuse"):
                made = self.student_makes(loop, z, c, i, shared).detach()
            c = self.judged(c)
            fake = self.fakes(target, z, c, made, draw)
            noise = self.draw_noise(draw)
            other = noise if o.noise.shared else self.draw_noise(draw)
            real, t = self.shown(target, noise), self.told_time(noise, draw)
            t_fake = t if other is noise else time_of(other)
            logits = critic(self.shown(fake.x, other), fake.z, fake.condition, t_fake)
            loss = critic_loss_of_maps(critic(real, z, c, t), logits, o.head_reduce).mean()
            log.setdefault("loss_critic", []).append(loss)
            loop.backward(loss)
            if i == 0 and o.r1.gamma and iteration % o.r1.interval == 0:
                with twice_differentiable(real.device):
                    loop.backward(self.penalty(critic, draw, real, z, c, t))
        loop.update("critic")

    def penalty(self, critic: nn.Module, draw: Draws, real: Tensor, z: Tensor, c: Asked, t: Tensor | None) -> Tensor:
        """R1 of the first row of the global batch, 0 times another one where that is not here."""
        r1, (row, share) = self.options.r1, one_sample(draw)
        one = slice(row, row + 1)
        c, t = None if c is None else c[one], None if t is None else t[one]
        squares = r1_of_maps(lambda x, z: critic(x, z, c, t), real[one], z[one], r1.of, self.options.head_reduce)
        return share * r1_weight(r1.gamma, r1.interval, r1.half, r1.lazy_gain) * squares.mean()

    def rows(self, micro: Batch, i: int, shared: Shared) -> tuple[Tensor, Tensor, Asked]:
        """z, the teacher's x, and the condition of micro-batch i, prompts encoded once for both steps."""
        assert micro.noise is not None and micro.target is not None
        if i == len(shared.asked):
            shared.asked.append(self.asked(self.condition_of(micro)))
        return micro.noise, micro.target, shared.asked[i]

    def student_makes(self, loop: Loop, z: Tensor, c: Asked, i: int, shared: Shared) -> Tensor:
        """The student's samples of micro-batch i, for `passes: reuse` made once for both steps."""
        if self.options.passes == "fresh":
            return loop.net("student")(z, c)
        if i == len(shared.made):
            shared.made.append(loop.net("student")(z, c))
        return shared.made[i]

    def judged(self, c: Asked) -> Asked:
        """The condition as the critic is told it."""
        return c.embedded if isinstance(c, Guided) and not self.options.critic.told else c

    def fakes(self, real: Tensor, z: Tensor, c: Asked, made: Tensor, draw: Draws) -> Fakes:
        mix = self.options.mix
        if not sum(mix.fractions):
            return Fakes(made, z, c, torch.zeros(len(z), dtype=torch.int64, device=z.device))
        sees_z = self.options.critic.z != "none"
        return mix_and_match(real, z, c, made, draw, mix.fractions, mix.group, mix.base, sees_z)

    def draw_noise(self, draw: Draws) -> Noise | None:
        noise = self.options.noise
        return draw_critic_noise(draw, self._spec.shape, noise.t_range) if noise.enable else None

    def told_time(self, noise: Noise | None, draw: Draws) -> Tensor | None:
        """The times of a micro-batch's rows that the critic is told: those of their noise; None: its usual one."""
        if self.options.critic.t != "random":
            return time_of(noise)
        assert self.teacher is not None
        network, spec = self.teacher.network, self.teacher.spec
        if isinstance(network, EDMView) and isinstance(network.levels, DiscreteLevels):
            return draw.randint(0, len(network.levels.sigmas))
        low, high = math.log(spec.sigma_min), math.log(spec.sigma_max)
        return (low + (high - low) * draw.rand()).exp()

    def shown(self, x: Tensor, noise: Noise | None) -> Tensor:
        """Samples as the critic sees them."""
        if noise is None:
            return x
        assert self.schedule is not None
        return noised(x, noise, self.schedule)


class Shared(NamedTuple):
    """What both steps of an iteration have in common, of each micro-batch."""

    asked: list[Asked]
    made: list[Tensor]


def time_of(noise: Noise | None) -> Tensor | None:
    return None if noise is None else noise.t


def critic_schedule(network: nn.Module, options: NoiseOptions) -> DiscreteSchedule:
    """The teacher's schedule, by which samples are noised for the critic. UserError: none, or of other steps."""
    schedule = network.config["schedule"] if isinstance(network, EDMView) else {}
    if not isinstance(network, EDMView) or schedule.get("kind") == "flow":
        raise UserError(
            "diffusion2gan.noise: noise ahead of the critic is for teachers with a discrete schedule", "enable: false"
        )
    with torch.device("cpu"):  # no part of a network, which a plan builds without memory
        found = DiscreteSchedule.from_config(schedule)
    low, high = options.t_range
    if not 0 <= low <= high < len(found.alphas_cumprod):
        raise UserError(f"diffusion2gan.noise.t_range: [{low}, {high}] is no range of the steps 0 to 999")
    return found


METHOD = Diffusion2GAN
