"""SPI-GAN: a GAN that follows straight paths from noise to images, without a score network (Choi et al. 2022, arXiv
2206.14464, Algorithm 1).

Real: i(t) = t x_0 + (1 - t) x_T (eq. 6), x_T of the forward process in one go. Fake: the synthesis of h(t), the
solution of a neural ODE from x_T (eq. 5). The critic sees both with their t. What the paper leaves open are options;
their defaults are what it or its code base comes nearest to.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.augment.ada import PIPES, AdaController, AdaPipeline, RandomNumbers
from d2o.critics.build import build_critic
from d2o.critics.style import MBSTD_GROUP
from d2o.diffusion.sde import get_process, perturb
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject
from d2o.losses.adversarial import Critic, PathLength, critic_loss, generator_loss, path_lengths, r1_penalty, spread
from d2o.methods.base import Batch, Draws, Loop, Options, S, Setup
from d2o.methods.student import StudentMethod
from d2o.networks.minibatch_std import group_size
from d2o.networks.style_generator import StyleGenerator
from d2o.students.style import StyleStudent
from d2o.teachers.base import Spec


class SPIGANOptions(Options):
    K: int = Field(2, ge=1, description="times of an iteration; the last is 1, the clean image")
    j_sampling: Literal["uniform_sorted", "stratified", "fixed", "fixed_with_0"] = Field(
        "uniform_sorted",
        description=(
            "the other times: K - 1 sorted draws from (0, 1); one draw per K-th of it; k / K (the ablation); these and "
            "0, which is x_T"
        ),
    )
    update_mode: Literal["per_j", "joint"] = Field(
        "per_j", description="one step of each network for each time, or one for the mean over all times"
    )
    ivp: Literal["restart", "incremental", "incremental_detach"] = Field(
        "restart",
        description="h(t_k) solved from 0; from h(t_{k-1}) with gradients (joint); or from its value without (per_j)",
    )
    latent: Literal["xT", "z", "alternate"] = Field(
        "xT",
        description=(
            "noise that the generator starts from: x_T of the images, fresh noise, or x_T for the critic's step and"
            " fresh for its own"
        ),
    )
    pair_noise: bool = Field(True, description="the real path ends in the same x_T as the fake one; false: in another")
    process: Literal["vp", "ve", "subvp"] = Field("vp", description="forward process of x_T")
    mixing_prob: float = Field(0.0, ge=0, le=1, description="share of images whose styles come from two noises")
    r1_gamma: float = Field(0.01, ge=0, description="weight of R1, gamma / 2 |grad D|^2 on real images; 0: none")
    r1_every: int = Field(16, ge=1, description="iterations from one R1 to the next; its weight is multiplied by this")
    pl_weight: float = Field(0.0, ge=0, description="weight of path length regularisation; 0: none")
    pl_every: int = Field(4, ge=1, description="iterations from one to the next; its weight is multiplied by this")
    lazy_correction: bool = Field(
        False,
        description=(
            "StyleGAN2's correction for lazy regularisation: with c = k / (k + 1), k the interval of the "
            "network's regulariser whatever its weight, learning rates times c and betas to the power of c"
        ),
    )
    ada: str | None = Field("bgc", description="augmentation pipeline (b, bg, bgc, bgcf, bgcfn, bgcfnc); null: none")
    ada_target: float = Field(
        0.6, ge=-1, le=1, description="what the mean sign of the critic's logits of real images is held at"
    )
    ada_interval: int = Field(4, ge=1, description="iterations between two moves of the probability")
    ada_kimg: float = Field(500, gt=0, description="thousand images in which the probability can go from 0 to 1")
    ada_fixed: float | None = Field(None, ge=0, le=1, description="hold the probability here instead")
    critic: JsonObject = Field(
        {}, description="options of the critic (blocks, base, max_channels, mbstd_group, time, time_scale, ...)"
    )


class SPIGAN(StudentMethod[SPIGANOptions]):
    name = "spi-gan"
    Options = SPIGANOptions
    data = "images"
    product = "generator"
    continues = ("style",)
    pools_across = True

    @classmethod
    def micro_multiple(cls, options: SPIGANOptions, batch: int) -> int:
        """The critic's groups."""
        return group_size(options.critic.get("mbstd_group", MBSTD_GROUP), batch)

    def __init__(self, setup: Setup[SPIGANOptions]):
        assert setup.images is not None
        self.options = setup.options
        o, (channels, resolution, _) = self.options, setup.images.shape
        if o.ada is not None and o.ada not in PIPES:
            raise unknown("spi_gan.ada: augmentation pipeline", o.ada, PIPES)
        if (o.ivp == "incremental") != (o.update_mode == "joint") and o.ivp != "restart":
            raise UserError(
                f"spi_gan.ivp: {o.ivp} does not go with update_mode {o.update_mode}",
                "joint: restart, incremental; per_j: restart, incremental_detach",
            )
        own = {"arch": "style_generator", "img_resolution": resolution, "img_channels": channels}
        config = {**own, **setup.need_network()}
        if any(config[key] != value for key, value in own.items()):
            raise UserError(
                f"network: method spi-gan trains a style_generator of the data's {channels} x {resolution} x"
                f" {resolution} pixels"
            )
        self._spec = Spec(setup.name, setup.images.shape, licence=setup.product_licence())
        generator = self.begin(setup, self._spec, config)
        assert isinstance(generator, StyleGenerator)
        self.generator = generator
        self.critic = build_critic(
            {"arch": "style_critic", "img_resolution": resolution, "img_channels": channels, **o.critic}
        )
        self.process = get_process(o.process)
        self.pipeline = AdaPipeline(o.ada) if o.ada else None
        self.controller = AdaController(setup.batch, o.ada_target, o.ada_interval, o.ada_kimg, fixed=o.ada_fixed)
        self.path_length = PathLength()

    def players(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    def states(self) -> dict[str, nn.Module]:
        return {"ada": self.controller, "path_length": self.path_length}

    def intervals(self) -> tuple[int, ...]:
        o = self.options
        return (*([o.pl_every] if o.pl_weight else []), *([o.r1_every] if o.r1_gamma else []))

    def optim(self, name: str, options: S) -> S:
        if not self.options.lazy_correction:
            return options
        was = options.model_dump()
        every = self.options.pl_every if name == "generator" else self.options.r1_every
        c = every / (every + 1)
        return options.model_copy(
            update={"lr": c * was["lr"], "final_lr": c * was["final_lr"], "betas": tuple(b**c for b in was["betas"])}
        )

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        """Algorithm 1: for each time, ascending, the generator (mapping and synthesis together), then the critic."""
        o, turn = self.options, count(1)
        log: dict[str, list[Tensor]] = {}
        starts, times = [], [1.0]
        for micro, draw in loop.micro_batches(batch):
            times = self.times(draw)
            starts.append(self.x_T(micro, draw))
        kept: list[Tensor | None] = [None] * len(starts)  # h at the last time, for incremental_detach
        signs = []

        for group in [[t] for t in times] if o.update_mode == "per_j" else [times]:
            # Generator
            styles: list[Tensor] = []
            for i, (_, draw) in enumerate(loop.micro_batches(batch, next(turn))):
                z = draw.randn(*self._spec.shape) if o.latent in ("z", "alternate") else starts[i]
                mix, start = self.mix(draw), self.go_on(kept[i], times, group)
                fake, _, h = loop.net("generator")(
                    noises=self.noises(draw, len(group)), z=z, times=group, mix=mix, start=start
                )
                with loop.frozen("critic") as critic:
                    loss = generator_loss(self.judge(critic, fake, group, draw)).mean()
                    loop.backward(loss)
                log.setdefault("loss_g", []).append(loss)
                kept[i] = h[-1].detach()
                styles.append(h[-1].detach().mean(0))
            if group[-1] == 1:
                self.generator.mapping.track(loop.everywhere(torch.stack(styles).mean(0, keepdim=True)))
            loop.update("generator")
            if o.pl_weight and iteration % o.pl_every == 0:
                again = next(turn)
                if len(starts) > 1:  # the target is of all lengths: measured first, each part made twice
                    mean = loop.mean([own.detach().mean() for own in self.lengths(loop, batch, again, starts, group)])
                    self.path_length.move(whole := loop.everywhere(mean))
                for lengths in self.lengths(loop, batch, again, starts, group):
                    if len(starts) == 1:
                        self.path_length.move(whole := loop.everywhere(lengths.detach().mean()))
                    loss = self.path_length.penalty(lengths, whole)
                    loop.backward(loss * o.pl_weight * o.pl_every)
                    log.setdefault("path_length", []).append(loss)
                loop.update("generator")

            # Critic
            for i, (micro, draw) in enumerate(loop.micro_batches(batch, next(turn))):
                z = draw.randn(*self._spec.shape) if o.latent == "z" else starts[i]
                with torch.no_grad():
                    fake, _, _ = loop.net("generator")(
                        noises=self.noises(draw, len(group)), z=z, times=group, mix=self.mix(draw)
                    )
                real = self.straight_path(micro, starts[i], group, draw)
                logits = [self.judge(loop.net("critic"), x, group, draw) for x in (real, fake)]
                loss = critic_loss(logits[0], logits[1]).mean()
                loop.backward(loss)
                signs.append(logits[0].detach().sign().mean())
                for key, value in (
                    ("loss_d", loss),
                    ("logit_real", logits[0].mean()),
                    ("logit_fake", logits[1].mean()),
                ):
                    log.setdefault(key, []).append(value)
                if group[-1] == 1 and len(z) > 1:
                    log.setdefault("diversity", []).append(spread(fake[-len(z) :]) / spread(real[-len(z) :]))
            loop.update("critic")
            if o.r1_gamma and iteration % o.r1_every == 0:
                for i, (micro, draw) in enumerate(loop.micro_batches(batch, next(turn))):
                    real = self.straight_path(micro, starts[i], group, draw)
                    squares = r1_penalty(self.judging(loop.net("critic"), group, draw), real)
                    loss = o.r1_gamma / 2 * squares.mean()
                    loop.backward(loss * o.r1_every)
                    log.setdefault("r1", []).append(loss)
                loop.update("critic")
        if self.pipeline is not None:
            self.controller.update(loop.everywhere(loop.mean(signs)))
            log["ada_p"] = [self.controller.p]
        return {key: loop.mean(values) for key, values in log.items()}

    def lengths(
        self, loop: Loop, batch: Batch, turn: int, starts: list[Tensor], group: list[float]
    ) -> Iterator[Tensor]:
        """Path lengths of half of each micro-batch, by the random numbers of that turn. UserError: no half of them."""
        for i, (_, draw) in enumerate(loop.micro_batches(batch, turn)):
            if draw.count < draw.total and draw.count % 2:
                what = f"path lengths are of every other image, and a process has {draw.count} of them"
                raise UserError(what, "spi_gan.pl_weight: take another number of processes, or another batch")
            noises = [_halves(draw, shape, group) for shape in self.generator.synthesis.noise_shapes]
            mix = self.mix(draw)
            mix = mix and (mix[0][::2], mix[1][::2])
            fake, ws, _ = loop.net("generator")(noises=noises, z=starts[i][::2], times=group, mix=mix)
            yield path_lengths(fake, ws, noise=_halves(draw, self._spec.shape, group))

    def times(self, draw: Draws) -> list[float]:
        """t_k = j_k / K, ascending, the last one 1 (section 3.4); the same for all samples and processes."""
        K = self.options.K
        k = torch.arange(1, K)
        if self.options.j_sampling == "fixed_with_0":
            return [0.0, *(k / K).tolist(), 1.0]
        if self.options.j_sampling == "fixed" or K == 1:
            return [*(k / K).tolist(), 1.0]
        u = draw.shared(K - 1).cpu()
        if self.options.j_sampling == "stratified":
            return [*((k - u) / K).tolist(), 1.0]
        return [*u.sort().values.tolist(), 1.0]

    def x_T(self, micro: Batch, draw: Draws) -> Tensor:
        """The images at the forward process's end (eq. 9 of the paper for VP)."""
        assert micro.images is not None
        x = micro.images
        return perturb(self.process, x, x.new_ones(len(x)), draw.randn(*self._spec.shape))

    def straight_path(self, micro: Batch, x_T: Tensor, times: list[float], draw: Draws) -> Tensor:
        """i(t) at each time, one after the other (eq. 6)."""
        assert micro.images is not None
        end = x_T if self.options.pair_noise else self.x_T(micro, draw)
        return torch.cat([t * micro.images + (1 - t) * end for t in times])

    def judge(self, critic: nn.Module, images: Tensor, times: list[float], draw: Draws) -> Tensor:
        """Logits of augmented images, time after time: what looks at a whole batch sees one time."""
        logits = []
        for t, x in zip(times, images.chunk(len(times)), strict=True):
            seen = (
                x
                if self.pipeline is None
                else self.pipeline(x, self.controller.p, _first(draw.randn, len(x)), _first(draw.rand, len(x)))
            )
            logits.append(critic(seen, t))
        return torch.cat(logits)

    def judging(self, critic: nn.Module, times: list[float], draw: Draws) -> Critic:
        """`judge` as a function of the images alone."""
        return lambda images, _: self.judge(critic, images, times, draw)

    def mix(self, draw: Draws) -> tuple[Tensor, Tensor] | None:
        """Style mixing (appendix B.3), for each image by itself: another noise, and the style input from which it is
        used [B]."""
        if self.options.mixing_prob == 0:
            return None
        second, (chance, where) = draw.randn(*self._spec.shape), draw.rand(2).unbind(1)
        num_ws = self.generator.synthesis.num_ws
        return second, torch.where(chance < self.options.mixing_prob, 1 + (where * (num_ws - 1)).long(), num_ws)

    def noises(self, draw: Draws, times: int) -> list[Tensor]:
        """The synthesis network's noise for the images at so many times, one after the other."""
        return [
            torch.cat([draw.randn(*shape) for _ in range(times)]) for shape in self.generator.synthesis.noise_shapes
        ]

    def go_on(self, kept: Tensor | None, times: list[float], group: list[float]) -> Tensor | None:
        """h(t_k) from the value of h(t_{k-1}), with the gradient of the last segment alone."""
        if self.options.ivp != "incremental_detach" or kept is None:
            return None
        return self.generator.mapping.continue_(kept, times[times.index(group[0]) - 1], group[0])

    def made(self, product: nn.Module) -> StyleStudent:
        return StyleStudent(product, self._spec)


def _halves(draw: Draws, shape: tuple[int, ...], times: list[float]) -> Tensor:
    """Noise for every other sample at each time."""
    return torch.cat([draw.randn(*shape)[::2] for _ in times])


def _first(numbers: RandomNumbers, n: int) -> RandomNumbers:
    """Random numbers for the first n samples of the micro-batch."""
    return lambda *shape: numbers(*shape)[:n]


METHOD = SPIGAN
