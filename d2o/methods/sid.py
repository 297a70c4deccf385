"""Score identity distillation: SiD (Zhou et al. 2024, arXiv 2404.04057), SiDA and SiD2A (Zhou et al. 2025, arXiv
2410.14919), Algorithm 1 of both.

A student makes images in one call at the noise level sigma_init (`student.sigma`, 2.5 in the papers). A score network,
which starts as the teacher, learns the score of these images; the student learns to make the two scores agree at all
noise levels. SiD needs no data. SiDA (`adversarial`) also has the score network's encoder tell real images from the
student's, by no weights of its own; SiD2A is SiDA from a student of SiD (`d2o finetune`). Of teachers that can be
guided, `cfg` and `score_cfg` guide the two scores: long and short guidance (SiD-LSG, Zhou et al. 2024, arXiv
2406.01561).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from d2o.diffusion.schedules import karras_sigma
from d2o.errors import UserError
from d2o.losses import score as losses
from d2o.losses.adversarial import critic_loss
from d2o.methods.bad_samples import BadSamples, finite
from d2o.methods.base import Batch, Loop, Options, Setup
from d2o.methods.score_networks import (
    ScoreMethod,
    check_real_images,
    labels_of_images,
    look,
    note,
    pool_size,
    true_score,
)
from d2o.methods.teachers import check_teacher
from d2o.networks.edm2_unet import EDM2Precond, force_normalised, keep_normalised
from d2o.networks.precond import set_disc_map

ForceWN = Literal["post_step", "pre_forward", "off"]


class SiDOptions(Options):
    alpha: float = Field(
        1.2, description="weight of the squared difference of the scores (SiD 1.0 or 1.2; SiDA 1.0; SiD2A 1.0 or 1.2)"
    )
    tmax: int = Field(
        800, ge=1, le=1000, description="the student's noise levels are those of t in [0, tmax / 1000] of the schedule"
    )
    sigma_min: float = Field(0.002, gt=0, description="noise level at t = 0")
    sigma_max: float = Field(80.0, gt=0, description="noise level at t = 1")
    rho: float = Field(7.0, gt=0, description="curvature of the noise schedule")
    lambda_sid: float = Field(100.0, ge=0, description="weight of the student's loss, a sum over pixels")
    lambda_score: float = Field(
        1.0, ge=0, description="weight of the score network's denoising loss, a sum over pixels"
    )
    p_mean: float = Field(-1.2, description="mean of ln sigma in the score network's training (EDM2: -0.4)")
    p_std: float = Field(1.2, gt=0, description="standard deviation of ln sigma in that training (EDM2: 1.0)")
    augment: float = Field(0.0, ge=0, le=1, description="probability of EDM's augmentations in that training; 0: none")
    train_dropout: bool = Field(
        True, description="dropout of the student in its own step; there is none in the images for the score network"
    )
    score_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout of the score network in its own step (default none: the teacher's)"
    )
    uncertainty: bool = Field(
        True, description="EDM2: weigh losses by the score network's uncertainty, where it has the head for it"
    )
    student_force_wn: ForceWN | None = Field(
        None, description="EDM2: forced weight normalisation of the student (default none: as its first network has it)"
    )
    score_force_wn: ForceWN | None = Field(
        None,
        description="EDM2: forced weight normalisation of the score network (default none: as the teacher's network"
        " has it; the published runs: on for SiD, off for SiDA and SiD2A)",
    )
    cfg: float = Field(
        1.0,
        ge=0,
        description="guidance of the true score in the student's step, D_u + cfg (D_c - D_u) (kappa_4 of SiD-LSG, Zhou"
        " et al. 2024, arXiv 2406.01561); 1: none",
    )
    score_cfg: float = Field(
        1.0,
        ge=0,
        description="guidance of the score network, both where it is trained and in the student's step (kappa_1 ="
        " kappa_2 = kappa_3; long-short guidance: as cfg, 1.5 or 2 for SD 1.5); 1: none",
    )
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="precision of the true score (default none: as the rest)"
    )
    labels: Literal["uniform", "data"] | None = Field(
        None,
        description="classes of the student's images: drawn uniformly, or as they occur in the data (default none: data"
        " if adversarial)",
    )
    nan: Literal["drop", "raise"] = Field(
        "raise",
        description="a sample that is not finite: stop, or leave it out of the losses and count it (with bad_gradients:"
        " zero: as published)",
    )
    adversarial: bool = Field(
        False, description="SiDA: the score network's encoder tells real images from the student's"
    )
    start_g_nimg: int | None = Field(
        None,
        ge=0,
        description="images after which the student starts to learn (default none: 100000 if adversarial, else 0)",
    )
    start_adv_nimg: int = Field(
        200_000, ge=0, description="images after which its loss becomes half SiD's and half adversarial"
    )
    lambda_adv: float = Field(0.01, ge=0, description="weight of the student's adversarial loss, times C H W")
    lambda_d: float = Field(1.0, ge=0, description="weight of the score network's loss as a critic (EDM2: 100)")
    batch_pool: int | None = Field(
        None,
        ge=1,
        description="samples whose adversarial losses are averaged, in a row of the batch (the papers' batch of one"
        " GPU); 1: each by itself (default none: the whole batch)",
    )
    gen_adv: Literal["nonsat_bce", "linear_fakeness", "saturating"] = Field(
        "nonsat_bce",
        description="the student's adversarial loss: -log D (the published code), 1 - D (the paper's eq. 7), or"
        " log(1 - D)",
    )
    logit_clamp: float | None = Field(
        10.0, gt=0, description="maps beyond this give the student no gradient; null: all do"
    )
    adv_half: Literal["single", "double"] = Field(
        "single", description="the adversarial loss is halved once (eq. 8), or twice (Algorithm 1, line 15)"
    )
    real_noise: Literal["shared", "shared_sigma", "independent"] = Field(
        "shared",
        description="noise of the real images: the fakes' own, another of the same level, or one of its own level",
    )
    disc_map: Literal["enc_last_mean", "mid_mean"] = Field(
        "enc_last_mean", description="where the map is taken: after the encoder's last block, or the U-Net's middle"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_for_both(cls, data: object) -> object:
        """`force_wn`, as older recipes have it, was one switch for both networks."""
        if not isinstance(data, dict) or "force_wn" not in data:
            return data
        rest = {key: value for key, value in data.items() if key != "force_wn"}
        return {"student_force_wn": data["force_wn"], "score_force_wn": data["force_wn"], **rest}


class SiD(ScoreMethod[SiDOptions]):
    name = "sid"
    Options = SiDOptions
    data = "none"
    stored_latents = True

    @classmethod
    def needs(cls, options: SiDOptions) -> str:
        return "images" if options.adversarial or options.labels == "data" else "none"

    @classmethod
    def micro_multiple(cls, options: SiDOptions, batch: int) -> int:
        return (options.batch_pool or batch) if options.adversarial else 1

    def __init__(self, setup: Setup[SiDOptions]):
        self.options = setup.options
        o, self.batch, self.device = self.options, setup.batch, setup.device
        self.teacher = check_teacher("sid", setup.teacher)
        self.student = self.begin_student(setup, self.teacher.spec)
        self._spec = self.student.spec
        self.score = self.begin_score(o.score_dropout, o.uncertainty)
        set_disc_map(self.score, o.disc_map)
        self.check(o)
        self.labels_of_data = labels_of_images("sid", setup, self.teacher.spec) if self.needs(o) == "images" else None
        if o.adversarial:
            check_real_images(setup, self.teacher)
        force_normalised(self.student.network, o.student_force_wn)
        force_normalised(self.score, o.score_force_wn)
        self.stepped = False  # whether the student learned in this iteration
        self.bad = BadSamples("sid", o.nan, self.device)

    def check(self, o: SiDOptions) -> None:
        """UserError: options that do not fit each other, the batch or the network."""
        if o.sigma_min >= o.sigma_max:
            raise UserError(
                f"sid: sigma_min {o.sigma_min:g} and sigma_max {o.sigma_max:g} are no range of noise levels"
            )
        self.check_guidance("cfg", o.cfg)
        self.check_guidance("score_cfg", o.score_cfg)
        if self.teacher.guide is not None and o.score_cfg != 1:
            raise UserError(
                f"sid.score_cfg: teacher {self.teacher.spec.name!r} is guided by a second network, and its score"
                " network has none",
                "leave sid.score_cfg away",
            )
        if o.adversarial and o.labels == "uniform":
            raise UserError(
                "sid.labels: uniform does not go with adversarial: true: images are compared with real ones of the same"
                " classes",
                "leave sid.labels away",
            )
        if o.adversarial and self.batch % (o.batch_pool or 1):
            raise UserError(f"sid.batch_pool: {o.batch_pool} does not divide the batch of {self.batch}")
        for key in ("student_force_wn", "score_force_wn"):
            if getattr(o, key) and not isinstance(self.score, EDM2Precond):
                raise UserError(f"sid.{key}: only networks of EDM2 have forced weight normalisation", "leave it away")
        self.check_augment(o.augment)

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Algorithm 1: the score network's step, then the student's, each with fresh noises. By the images seen before
        this iteration: at first the student waits (SiDA), then its loss is SiD's, then both."""
        o, seen = self.options, iteration * self.batch
        log: dict[str, list[Tensor]] = {}
        self.score_step(loop, batch, log)
        wait = o.start_g_nimg if o.start_g_nimg is not None else 100_000 if o.adversarial else -1
        self.stepped = seen > wait
        if self.stepped:
            self.student_step(loop, batch, log, adversarial=o.adversarial and seen > o.start_adv_nimg)
        scalars = {key: loop.mean(values) for key, values in log.items()}
        bad = torch.stack([scalars.pop(key) for key in ("bad_score", "bad_student") if key in scalars])
        return scalars | self.bad.told(self.batch * bad.sum(), iteration)

    def heaviest(self) -> int:
        """One in which both the student learns and its images are compared with real ones."""
        begins = [self.options.start_g_nimg or 0]
        begins += [self.options.start_adv_nimg, 100_000] if self.options.adversarial else []
        return max(begins) // self.batch + 1

    def score_step(self, loop: Loop, batch: Batch, log: dict[str, list[Tensor]]) -> None:
        """The score network learns the score of the student's images (Algorithm 1, lines 4-7), and to tell them from
        real ones (SiDA)."""
        o, net = self.options, loop.net("score")
        self.student.eval()
        self.score.train()
        for micro, draw in loop.micro_batches(batch):
            own = o.adversarial and micro.condition.kind != "none"
            embedded = self.embedded(self.condition_of(micro) if own else self.draw_condition(draw))
            with torch.no_grad():
                x = loop.net("student")(draw.randn(*self.student.spec.shape), embedded)
            keep = finite(x)
            y, told = self.augmented(self.bad.replaced(x, keep, 0), o.augment, draw)
            sigma = losses.lognormal_sigma(draw.randn(1, 1, 1), o.p_mean, o.p_std)
            normal = draw.randn(*y.shape[1:])
            part = "encoder_decoder" if o.adversarial else "decoder"
            short = self.guidance(o.score_cfg, embedded)
            denoised, fake, u = look(net, y + sigma * normal, sigma, embedded, part, told, **short)
            keep = keep & finite(denoised)
            score = self.bad.summed(losses.denoising_loss(denoised, y, sigma, self.score.sigma_data, u), keep)
            loss = o.lambda_score * score
            if o.adversarial:
                y, told = self.augmented(self.reals(micro, draw), o.augment, draw)
                real_sigma = sigma
                if o.real_noise == "independent":
                    real_sigma = losses.lognormal_sigma(draw.randn(1, 1, 1), o.p_mean, o.p_std)
                if o.real_noise != "shared":
                    normal = draw.randn(*y.shape[1:])
                _, real, real_u = look(net, y + real_sigma * normal, real_sigma, embedded, "encoder", told)
                weights = (
                    losses.edm_weight(real_sigma, self.score.sigma_data, real_u),
                    losses.edm_weight(sigma, self.score.sigma_data, u),
                )
                pool = pool_size("sid", o.batch_pool, self.batch, draw.count)
                loss_d = losses.critic_adversarial(real, fake, pool, *weights, self.bad.counting(keep))
                loss = loss + o.lambda_d * loss_d
                note(log, logit_real=real.mean(), logit_fake=fake.mean(), loss_d=critic_loss(real, fake).mean())
            loop.backward(loss.mean())
            note(log, loss_score=score.mean() / x[0].numel(), bad_score=1 - keep.float().mean())
        loop.update("score")
        keep_normalised(self.score)

    def student_step(self, loop: Loop, batch: Batch, log: dict[str, list[Tensor]], adversarial: bool) -> None:
        """The student makes both scores agree (Algorithm 1, lines 8-12); gradients flow through both networks, whose
        weights are held."""
        o, shape = self.options, self.student.spec.shape
        self.student.train(o.train_dropout)
        self.score.eval()
        for _, draw in loop.micro_batches(batch, turn=1):
            with loop.frozen("score") as net:
                embedded = self.embedded(self.draw_condition(draw))
                x = loop.net("student")(draw.randn(*shape), embedded)
                t = draw.rand(1, 1, 1) * (o.tmax / 1000)
                sigma = karras_sigma(1 - t, o.sigma_min, o.sigma_max, o.rho)
                x_t = x + sigma * draw.randn(*shape)
                true = true_score(self.teacher, x_t, sigma, embedded, o.teacher_precision, o.cfg)
                part = "encoder_decoder" if adversarial else "decoder"
                fake, logits, u = look(net, x_t, sigma, embedded, part, **self.guidance(o.score_cfg, embedded))
                keep = finite(x, true, fake)
                self.bad.no_gradient(x, keep)
                weight = self.bad.replaced(losses.mean_error(x, true, u), keep, 1)
                sid = self.bad.summed(losses.sid_loss(x, true, fake, o.alpha, weight), keep)
                loss = o.lambda_sid * sid
                if adversarial:
                    pool = pool_size("sid", o.batch_pool, self.batch, draw.count)
                    counting = self.bad.counting(keep)
                    paid = losses.generator_adversarial(logits, pool, o.gen_adv, o.logit_clamp, counting)
                    gan = self.bad.summed(x[0].numel() * paid / weight.flatten(), keep)
                    loss = 0.5 * loss + (0.5 if o.adv_half == "single" else 0.25) * o.lambda_adv * gan
                    note(log, loss_adv=paid.mean())
                loop.backward(loss.mean())
            delta = self.bad.summed((true - fake).abs(), keep).mean() / x[0].numel()
            note(log, loss_g=sid.mean() / x[0].numel(), delta=delta, bad_student=1 - keep.float().mean())
        loop.update("student")

    def settle(self) -> None:
        if self.stepped:
            keep_normalised(self.student.network)


METHOD = SiD
