"""EDM: denoising score matching on real images. It trains teachers (Karras et al. 2022, section 5, Table 1)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.augment import edm as augment
from d2o.condition import Condition
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.losses.score import denoising_loss, lognormal_sigma
from d2o.methods.base import Batch, Loop, Method, Options, Setup
from d2o.networks.build import build_network
from d2o.networks.edm2_unet import EDM2Precond, keep_normalised
from d2o.networks.precond import Denoiser
from d2o.teachers.base import Spec, Teacher


class EDMOptions(Options):
    p_mean: float = Field(-1.2, description="mean of ln sigma")
    p_std: float = Field(1.2, gt=0, description="standard deviation of ln sigma")
    label_dropout: float = Field(
        0.0, ge=0, le=1, description="share of samples trained without their class (for classifier-free guidance)"
    )
    augment: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of EDM's augmentations, of which the network is told (EDM: 0.12 on CIFAR-10, "
        "0.15 on FFHQ and AFHQv2; network.augment_dim: 9); 0: none",
    )
    steps: int = Field(18, ge=1, description="Heun steps of previews and metrics")


class EDM(Method[EDMOptions]):
    name = "edm"
    Options = EDMOptions
    data = "images"
    product = "denoiser"

    def __init__(self, setup: Setup[EDMOptions]):
        assert setup.images is not None
        self.options = setup.options
        channels, resolution, _ = setup.images.shape
        config = {
            "img_resolution": resolution,
            "img_channels": channels,
            "label_dim": setup.images.classes,
            **setup.need_network(),
        }
        if config.get("arch") == "classifier":
            raise UserError(
                "network.arch: a classifier is not a denoiser; method edm trains ddpmpp, ncsnpp, adm or edm2"
            )
        denoiser = build_network(config)
        assert isinstance(denoiser, Denoiser)
        self.denoiser, self.sigma_data = denoiser, denoiser.sigma_data
        if self.options.augment and config.get("augment_dim") != augment.LABELS:
            raise UserError(
                "edm.augment: the network takes no augmentation labels, so that the augmentations would come out of it",
                f"set network.augment_dim: {augment.LABELS} (ddpmpp, ncsnpp, adm), or edm.augment: 0",
            )
        self.uncertain = isinstance(denoiser, EDM2Precond) and denoiser.logvar_linear is not None
        classes = config["label_dim"]
        if (channels, resolution, classes) != (
            self.denoiser.img_channels,
            self.denoiser.img_resolution,
            setup.images.classes,
        ):
            have = f"{channels} x {resolution} x {resolution}, {classes} classes"
            raise UserError(f"the network section asks for other images than the data has ({have})")
        self._spec = Spec(
            setup.name,
            (channels, resolution, resolution),
            condition="label" if classes else "none",
            classes=classes,
            licence=setup.licence,
            guidable=self.options.label_dropout > 0,
        )

    def players(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses = []
        for micro, draw in loop.micro_batches(batch):
            y, labels = micro.images, micro.condition.labels
            assert y is not None
            asked: dict[str, Any] = {}
            if self.options.augment:
                y, asked["augment_labels"] = augment.augment(y, self.options.augment, draw.randn, draw.rand)
            sigma = lognormal_sigma(draw.randn(1, 1, 1), self.options.p_mean, self.options.p_std)
            noise = sigma * draw.randn(*y.shape[1:])
            if labels is not None and self.options.label_dropout:
                labels = torch.where(draw.rand() < self.options.label_dropout, -1, labels)
            if self.uncertain:  # EDM2's networks state their own uncertainty u(sigma)
                asked["return_logvar"] = True
            found = loop.net("denoiser")(y + noise, sigma.flatten(), labels, **asked)
            denoised, u = found if self.uncertain else (found, None)
            loss = denoising_loss(denoised, y, sigma, self.sigma_data, u).mean()
            loop.backward(loss)
            losses.append(loss)
        loop.update("denoiser")
        return {"loss": loop.mean(losses)}

    def settle(self) -> None:
        keep_normalised(self.denoiser)  # EDM2's average is of the weights as the optimiser left them

    def describe(self) -> JsonObject:
        return {"kind": "teacher", "network": self.denoiser.config, "spec": self._spec}

    def spec(self) -> Spec:
        return self._spec

    def generate(self, product: nn.Module, noise: Tensor, condition: Condition) -> Tensor:
        training = product.training
        teacher = Teacher(product, self._spec, noise.device)
        images = teacher.decode(teacher.sample(noise, condition, "heun", self.options.steps))
        product.train(training)
        return images

    def nfe(self) -> int:
        return 2 * self.options.steps - 1


METHOD = EDM
