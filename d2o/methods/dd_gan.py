"""Denoising diffusion GANs: a conditional GAN for each of K large denoising steps (Xiao, Kreis & Vahdat 2022), the
baseline of SPI-GAN.

Their section 3.2. Every iteration first trains the critic, then the generator, on the same real images with fresh
steps, noises and latents; what the paper leaves open (the loss's form, when R1 is taken and how it is weighted, the
order) is as in the authors' training.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.critics.build import build_critic
from d2o.critics.dd_gan import GROUP
from d2o.diffusion.ddgan import DDGANProcess
from d2o.errors import UserError
from d2o.losses.adversarial import critic_loss, generator_loss, spread, squared_gradient
from d2o.methods.base import Batch, Draws, Loop, Options, Setup
from d2o.methods.student import StudentMethod
from d2o.networks.minibatch_std import group_size
from d2o.networks.ncsnpp_z import DDGANGenerator
from d2o.students.base import Student
from d2o.students.multistep import MultistepStudent
from d2o.teachers.base import Spec


class DDGANOptions(Options):
    steps: int = Field(4, ge=1, description="K, the denoising steps: network calls of one image")
    r1_gamma: float = Field(
        0.02, ge=0, description="weight of R1, gamma / 2 |grad_{x_t} D|^2, which keeps the critic smooth; 0: none"
    )
    r1_every: int = Field(
        15, ge=1, description="iterations from one R1 to the next; its weight is not multiplied by this"
    )
    critic: Literal["auto", "small", "large"] = Field(
        "auto", description="critic: the paper's at 32 px, or at 256 px; auto: large from 128 px"
    )
    critic_width: int = Field(64, ge=1, description="width of the critic; its first layer has twice as many channels")
    critic_temb: int = Field(256, ge=2, description="width of the critic's embedding of the step")
    conditional: bool = Field(
        False, description="tell both networks the images' classes (the paper's are unconditional)"
    )


class Randoms(NamedTuple):
    """What one network's turn draws for its images: the step t [B], n1 and n2 of the real pair, latents z [B, nz], the
    posterior's noise."""

    t: Tensor
    n1: Tensor
    n2: Tensor
    z: Tensor
    noise: Tensor


class DDGAN(StudentMethod[DDGANOptions]):
    name = "dd-gan"
    Options = DDGANOptions
    data = "images"
    product = "generator"
    continues = ("multistep",)
    pools_across = True

    @classmethod
    def micro_multiple(cls, options: DDGANOptions, batch: int) -> int:
        return group_size(GROUP, batch)

    def __init__(self, setup: Setup[DDGANOptions]):
        assert setup.images is not None
        self.options = setup.options
        channels, resolution, _ = shape = setup.images.shape
        classes = setup.images.classes if self.options.conditional else 0
        if self.options.conditional and not classes:
            raise UserError(
                f"dd_gan.conditional: {setup.images.name} has no classes", "give a folder with one sub-folder per class"
            )
        config = {
            "arch": "ddgan",
            "img_resolution": resolution,
            "img_channels": channels,
            "classes": classes,
            **setup.need_network(),
        }
        if config["arch"] != "ddgan":
            raise UserError(f"network.arch: method dd-gan trains ddgan, not {config['arch']}")
        if (config["img_resolution"], config["img_channels"], config["classes"]) != (resolution, channels, classes):
            have = f"{channels} x {resolution} x {resolution}, {classes} classes"
            raise UserError(f"the network section asks for other images than the data has ({have})")
        self._spec = Spec(
            setup.name,
            shape,
            condition="label" if classes else "none",
            classes=classes,
            licence=setup.product_licence(),
        )
        generator = self.begin(setup, self._spec, config)
        assert isinstance(generator, DDGANGenerator)
        self.generator = generator
        self.critic = build_critic(
            {
                "arch": "ddgan_critic",
                "img_resolution": resolution,
                "img_channels": channels,
                "classes": classes,
                "kind": self.options.critic,
                "width": self.options.critic_width,
                "temb": self.options.critic_temb,
            }
        )
        self.process = DDGANProcess(self.options.steps)

    def check_start(self, setup: Setup[DDGANOptions], start: Student, spec: Spec) -> None:
        super().check_start(setup, start, spec)
        if start.nfe != self.options.steps:
            raise UserError(
                f"dd_gan.steps is {self.options.steps}, but the student to start from makes an image in {start.nfe}",
                f"set dd_gan.steps: {start.nfe}",
            )

    def players(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def intervals(self) -> tuple[int, ...]:
        return (self.options.r1_every,) if self.options.r1_gamma else ()

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        regularise = self.options.r1_gamma > 0 and iteration % self.options.r1_every == 0
        log: dict[str, list[Tensor]] = {"loss_g": [], "loss_d": [], "logit_real": [], "logit_fake": []}

        for micro, draw in loop.micro_batches(batch):
            x0, labels, r = *self.images(micro), self.randoms(draw)
            x_t, x_next = self.process.pair(x0, r.t, r.n1, r.n2)
            with torch.no_grad():
                clean = loop.net("generator")(x_next, r.t, r.z, labels)
                x_fake = self.process.posterior(clean, x_next, r.t, r.noise)
            x_t.requires_grad_(regularise)
            real = loop.net("critic")(x_t, r.t, x_next, labels)
            fake = loop.net("critic")(x_fake, r.t, x_next, labels)
            loss = critic_loss(real, fake).mean()
            log["loss_d"].append(loss)
            log["logit_real"].append(real.mean())
            log["logit_fake"].append(fake.mean())
            if len(x0) > 1:  # of x_0: in x_t the noise would hide a collapse
                log.setdefault("diversity", []).append(spread(clean) / spread(x0))
            if regularise:
                r1 = self.options.r1_gamma / 2 * squared_gradient(real, x_t).mean()
                log.setdefault("r1", []).append(r1)
                loss = loss + r1
            loop.backward(loss)
        loop.update("critic")

        for micro, draw in loop.micro_batches(batch, turn=1):
            x0, labels, r = *self.images(micro), self.randoms(draw)
            _, x_next = self.process.pair(x0, r.t, r.n1, r.n2)
            x_fake = self.process.posterior(loop.net("generator")(x_next, r.t, r.z, labels), x_next, r.t, r.noise)
            with loop.frozen("critic") as critic:
                loss = generator_loss(critic(x_fake, r.t, x_next, labels)).mean()
                loop.backward(loss)
            log["loss_g"].append(loss)
        loop.update("generator")
        return {key: loop.mean(values) for key, values in log.items()}

    def randoms(self, draw: Draws) -> Randoms:
        shape = self._spec.shape
        t, n1, n2 = draw.randint(0, self.options.steps), draw.randn(*shape), draw.randn(*shape)
        return Randoms(t, n1, n2, draw.randn(self.generator.nz), draw.randn(*shape))

    def images(self, micro: Batch) -> tuple[Tensor, Tensor | None]:
        assert micro.images is not None
        return micro.images, micro.condition.labels if self.options.conditional else None

    def made(self, product: nn.Module) -> MultistepStudent:
        return MultistepStudent(product, self._spec, self.options.steps)


METHOD = DDGAN
