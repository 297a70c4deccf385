"""GDD: a GAN alone turns a diffusion model into a one-step generator (Zheng & Yang 2024, "Diffusion Models Are Innate
One-Step Generators", arXiv 2405.20750). GDD-I is this with `student.freeze: conv` (section 4.2).

The student is the teacher's network, called once at sigma_max. Its images have to look real to a projected critic; they
are not those that the teacher makes of the same noise. Analyses of the paper are options: students of 2, 4, 8 and 10
calls (`student.steps`, Fig. 2), a consistency term beside the GAN (`cd`, Fig. 4B), other critics (Table 1a).

The authors' loss is a sum over the images of one GPU, and R1, a step of its own, a mean over them: `main_scale` says
how many these are, so that the result does not depend on how many GPUs there are here.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.augment.ada import PIPES, AdaController, AdaPipeline
from d2o.condition import Embedded
from d2o.critics.build import make_critic
from d2o.critics.critic_section import CriticSection
from d2o.critics.projected import ProjectedCritic
from d2o.diffusion.solvers import Denoise
from d2o.errors import UserError, unknown
from d2o.losses import consistency as c
from d2o.losses.adversarial import critic_loss, generator_loss, r1_penalty, spread
from d2o.losses.logit_maps import twice_differentiable
from d2o.methods.base import Batch, Draws, Loop, Options, Setup
from d2o.methods.output_distance import DistanceKind, DistanceOptions, OutputDistance
from d2o.methods.score_networks import check_real_images, labels_of_images
from d2o.methods.student import StudentMethod
from d2o.methods.teachers import check_teacher
from d2o.networks.build import network_config
from d2o.networks.config import Config
from d2o.networks.edm2_unet import keep_normalised, remove_uncertainty
from d2o.networks.edm_unet import EDMPrecond, remove_augment
from d2o.networks.edm_view import lowest_level
from d2o.networks.full_precision import full_precision
from d2o.settings.section import Section
from d2o.students.base import Student
from d2o.students.few_step import FewStepStudent
from d2o.teachers.base import Spec, Teacher

S = TypeVar("S", bound=Section)


class PenaltyOptions(Options):
    """`r1:`, the gradient penalty of real images."""

    gamma: float = Field(1e-4, ge=0, description="gamma / 2 |grad D|^2, mean over the batch; 0: none (Table 1b)")
    interval: int = Field(16, ge=1, description="iterations from one to the next; its loss is multiplied by this")
    lazy_correction: bool = Field(
        True,
        description=(
            "with c = interval / (interval + 1), the critic's learning rate times c and its betas to the power of c, as"
            " StyleGAN2 does (the authors' code)"
        ),
    )


class TermDistance(DistanceOptions):
    kind: DistanceKind = Field("lpips", description="lpips, perceptual (of any features), mse, l1, pseudo_huber")
    size: int | None = Field(
        224, ge=1, description="pixels to which images are resized for lpips and perceptual; null: not at all"
    )


class TermOptions(Options):
    """`cd:`, consistency distillation beside the GAN (Fig. 4B)."""

    weight: float = Field(0.0, ge=0, description="weight of the mean distance (the authors' code: 1); 0: none")
    N: int = Field(18, ge=2, description="steps of the grid of noise levels")
    i_min: Literal[1, 2] = Field(2, description="lowest index of t on it (the authors' code: 2)")
    distance: TermDistance = Field(TermDistance.model_validate({}), description="between the student's two images")


class AdaOptions(Options):
    """`ada:`, adaptive augmentation of what the critic sees (Table 1a: StyleGAN2's, VGG's and LPIPS' critics)."""

    pipe: str | None = Field(None, description="b, bg, bgc, bgcf, bgcfn, bgcfnc; null: none")
    target: float = Field(0.6, ge=-1, le=1, description="what the mean sign of the logits of real images is held at")
    interval: int = Field(4, ge=1, description="iterations between two moves of the probability")
    kimg: float = Field(500, gt=0, description="thousand images in which the probability can go from 0 to 1")


class GDDOptions(Options):
    loss: Literal["nonsaturating", "hinge"] = Field("nonsaturating", description="adversarial loss (eqs. 3, 4)")
    main_scale: float | None = Field(
        None,
        gt=0,
        description=(
            "what the mean adversarial losses of both networks are multiplied by: the images of one of the authors'"
            " GPUs (default none: an eighth of the batch)"
        ),
    )
    critic: CriticSection = Field(CriticSection.model_validate({}), description="what tells real images from made ones")
    r1: PenaltyOptions = Field(PenaltyOptions.model_validate({}), description="R1, every few iterations")
    ada: AdaOptions = Field(AdaOptions.model_validate({}), description="adaptive augmentation")
    last: Literal["x0", "sigma_min"] = Field(
        "sigma_min",
        description=(
            "students of several calls: their image is where the last call leads at the lowest noise level (the paper),"
            " or that call's x_0 (the authors' code)"
        ),
    )
    cd: TermOptions = Field(TermOptions.model_validate({}), description="consistency distillation beside the GAN")


class GDD(StudentMethod[GDDOptions]):
    name = "gdd"
    Options = GDDOptions
    data, takes = "images", "edm"
    stored_latents, few_steps, pools_across = True, True, True
    continues = ("denoiser", "few_step")
    teacher: Teacher

    @classmethod
    def micro_multiple(cls, options: GDDOptions, batch: int) -> int:
        """The pool of the critic's normalisation."""
        return options.critic.together(batch)

    def __init__(self, setup: Setup[GDDOptions]):
        assert setup.images is not None
        self.options, self.device, self.batch = setup.options, setup.device, setup.batch
        o = self.options
        self.teacher = check_teacher(self.name, setup.teacher)
        self.labels_of_data = labels_of_images(self.name, setup, self.teacher.spec)
        check_real_images(setup, self.teacher)
        if o.ada.pipe is not None and o.ada.pipe not in PIPES:
            raise unknown("gdd.ada.pipe", o.ada.pipe, PIPES)
        if o.ada.pipe is not None and o.critic.diffaug:
            what = "gdd: ada.pipe and critic.diffaug are two augmentations of the same images"
            raise UserError(what, "take one of them out")
        self.student = self.begin_student(setup, self.teacher.spec)
        self._spec = self.student.spec
        self.scale = setup.batch / 8 if o.main_scale is None else o.main_scale
        shape = self.teacher.space.image_shape(self._spec.shape)
        self.critic = make_critic(o.critic, shape, self._spec.classes, setup.device)
        self.pipeline = AdaPipeline(o.ada.pipe) if o.ada.pipe else None
        self.controller = AdaController(setup.batch, o.ada.target, o.ada.interval, o.ada.kimg)
        self.distance: OutputDistance | None = None
        if o.cd.weight:
            self.check_latents("cd.distance.kind", o.cd.distance.kind, ())
            self.distance = OutputDistance(o.cd.distance, self.teacher, setup.device, f"{self.name}.cd.distance")

    # How the student begins -------------------------------------------------------------------------------------------

    def begin(self, setup: Setup[GDDOptions], spec: Spec, own: Config | None = None) -> nn.Module:
        """The network in the form of appendix B.4, c_skip and c_out of consistency models, where it has EDM's; without
        what a student never needs."""
        network = super().begin(setup, spec, own)
        remove_uncertainty(network)
        remove_augment(network)
        if isinstance(network, EDMPrecond) and network.precond == "edm":
            network.precond = network_config(network)["precond"] = "consistency"
        return network

    def of_steps(self, setup: Setup[GDDOptions], student: Student) -> Student:
        found = super().of_steps(setup, student)
        if isinstance(found, FewStepStudent):
            found.last = lowest_level(found.network) if self.options.last == "sigma_min" else 0.0
        return found

    # What the loop asks -----------------------------------------------------------------------------------------------

    def players(self) -> dict[str, nn.Module]:
        return {"student": self.student, "critic": self.critic}

    def frozen(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        if isinstance(self.critic, ProjectedCritic):
            found["backbones"] = self.critic.backbones
        if self.distance is not None:
            found["teacher"] = self.teacher.network
            if self.distance.network is not None:
                found["distance"] = self.distance.network
        return found

    def states(self) -> dict[str, nn.Module]:
        return {} if self.pipeline is None else {"ada": self.controller}

    def optim(self, name: str, options: S) -> S:
        r1 = self.options.r1
        if name != "critic" or not r1.lazy_correction:
            return options
        was, by = options.model_dump(), r1.interval / (r1.interval + 1)
        betas = tuple(beta**by for beta in was["betas"])
        return options.model_copy(update={"lr": by * was["lr"], "final_lr": by * was["final_lr"], "betas": betas})

    def heaviest(self) -> int:
        return self.options.r1.interval if self.options.r1.gamma else 0

    def intervals(self) -> tuple[int, ...]:
        return (self.options.r1.interval,) if self.options.r1.gamma else ()

    def settle(self) -> None:
        self.critic.settle()
        keep_normalised(self.student.network)

    # One iteration ----------------------------------------------------------------------------------------------------

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """The student's step, the critic's against new images of the updated student, and R1, in the code's order."""
        log: dict[str, list[Tensor]] = {}
        self.student_step(loop, batch, log)
        self.critic_step(loop, batch, log)
        if self.options.r1.gamma and iteration > 0 and iteration % self.options.r1.interval == 0:
            self.penalty_step(loop, batch, log)
        return {key: loop.mean(values) for key, values in log.items()}

    def student_step(self, loop: Loop, batch: Batch, log: dict[str, list[Tensor]]) -> None:
        o = self.options
        for micro, draw in loop.micro_batches(batch):
            z, embedded = draw.randn(*self._spec.shape), self.asked(self.condition_of(micro))
            x = loop.net("student")(z, embedded)
            with loop.frozen("critic") as critic:
                logits = self.judge(critic, draw, self.shown(x), self.labels(micro), draw)
                paid = generator_loss(logits, o.loss).mean()
                loss = self.scale * paid
                if self.distance is not None:
                    term = self.consistency(micro, z, draw).mean()
                    loss = loss + o.cd.weight * term
                    log.setdefault("loss_cd", []).append(term)
                loop.backward(loss)
            log.setdefault("loss_g", []).append(paid / len(logits))
        loop.update("student")

    def critic_step(self, loop: Loop, batch: Batch, log: dict[str, list[Tensor]]) -> None:
        signs = []
        for micro, draw in loop.micro_batches(batch, 1):
            z, embedded = draw.randn(*self._spec.shape), self.asked(self.condition_of(micro))
            with torch.no_grad():
                fake = self.shown(loop.net("student")(z, embedded))
            real = self.real_images(micro, draw)
            critic = loop.net("critic")
            of_fake, of_real = (self.judge(critic, draw, x, self.labels(micro), draw) for x in (fake, real))
            loss = critic_loss(of_real, of_fake, self.options.loss).mean()
            loop.backward(self.scale * loss)
            signs.append(mean_of([each.sign() for each in of_real]))
            found = {"loss_d": loss / len(of_real), "logit_real": mean_of(of_real), "logit_fake": mean_of(of_fake)}
            if len(fake) > 1:
                found["diversity"] = spread(fake) / spread(real)
            for key, value in found.items():
                log.setdefault(key, []).append(value)
        loop.update("critic")
        if self.pipeline is not None:
            self.controller.update(loop.everywhere(loop.mean(signs)))
            log["ada_p"] = [self.controller.p]

    def penalty_step(self, loop: Loop, batch: Batch, log: dict[str, list[Tensor]]) -> None:
        """R1 of the real images, whose gradient comes through the frozen backbones; without DiffAugment, through ADA as
        StyleGAN2 has it."""
        r1 = self.options.r1
        for micro, draw in loop.micro_batches(batch, 2):
            real = self.real_images(micro, draw)
            judge = partial(self.judge, loop.net("critic"), draw)
            with twice_differentiable(real.device):
                loss = r1.gamma / 2 * r1_penalty(judge, real, self.labels(micro)).mean()
                loop.backward(r1.interval * loss)
            log.setdefault("r1", []).append(loss)
        loop.update("critic")

    def judge(
        self, critic: nn.Module, draw: Draws, images: Tensor, labels: Tensor | None, augment: Draws | None = None
    ) -> list[Tensor]:
        """Logits [B, M] of each part of the critic, in full precision; `augment`: draws of DiffAugment."""
        with full_precision(images.device.type):
            if self.pipeline is not None:
                images = self.pipeline(images, self.controller.p, draw.randn, draw.rand)
            return critic(images, labels, augment)

    def labels(self, micro: Batch) -> Tensor | None:
        """What a conditional critic is told; None where there are no classes."""
        found = self.embedded(self.condition_of(micro)) if self._spec.classes else None
        return found if isinstance(found, Tensor) else None

    def shown(self, x: Tensor) -> Tensor:
        """The images that samples are, with gradients to the samples."""
        return self.teacher.space.pixels(x) if self._spec.latent else x.float()

    def real_images(self, micro: Batch, draw: Draws) -> Tensor:
        """Those of the data; of stored latents what the autoencoder makes of them."""
        images = micro.images
        assert images is not None
        if not self._spec.latent or images.shape[1] == 3:
            return images
        return self.teacher.space.decode(self.reals(micro, draw))

    def consistency(self, micro: Batch, z: Tensor, draw: Draws) -> Tensor:
        """Distances [B] of g(v, t), v = x + t z, to where the teacher's step from t to u and then the student's from u
        to the lowest level lead; if u is the one above it, the teacher's. z is that of the GAN's images."""
        o, network = self.options.cd, self.student.network
        x, embedded = self.reals(micro, draw), self.embedded(self.condition_of(micro))
        i = draw.randint(o.i_min, o.N + 1)
        lowest, highest = lowest_level(network), self.student.sigma
        t, u, end = (c.karras_time(k, o.N, lowest, highest) for k in (i, i - 1, 0 * i))
        v = x + c.column(t, x) * z
        with torch.no_grad():
            with full_precision(x.device.type):
                y = c.heun_step(self.denoised(embedded), v, t, u)
                near = c.heun_step(self.denoised(embedded), y, u, end)
            goal = c.jump(y, network(y, u, embedded), u, end)
            goal = torch.where((i == 2)[:, None, None, None], near, goal)
        assert self.distance is not None
        made = network(v, t, embedded)
        with full_precision(x.device.type):
            return self.distance(made.float(), goal.float())

    def denoised(self, embedded: Embedded) -> Denoise:
        """The teacher, of that condition."""
        return lambda x, t: self.teacher.denoise(x, t, embedded)


def mean_of(logits: list[Tensor]) -> Tensor:
    """Over all of them, each backbone counting alike."""
    return torch.stack([each.detach().mean() for each in logits]).mean()


METHOD = GDD
