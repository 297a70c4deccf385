"""Classification of latents, or of pixels, by VGG-16: the first of two stages in which LatentLPIPS is trained (Kang et
al. 2024, section 3.2 and appendix B.2, Table A2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.augment.crop import centre_crops, random_crops
from d2o.data.images import ImageSet, open_images, to_float
from d2o.data.stored_latents import LatentSet
from d2o.data.triplets import TripletSet
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.methods.base import Batch, Loop, Method, Options, Setup
from d2o.methods.holdout import hold_out, need_classes
from d2o.networks.build import build_network
from d2o.networks.vgg_classifier import LatentClassifier, RunningStatistics
from d2o.spaces.base import PIXELS
from d2o.spaces.load import load_space


class LatentClassifierOptions(Options):
    space: str = Field(
        description="latent space: sd15, sd21, sdxl, sd3, flux, tiny-sd, where an autoencoder lies, or pixels"
    )
    image_size: int = Field(224, ge=8, description="pixels of the crops that are encoded and classified")
    crop_scale: tuple[float, float] = Field(
        (0.08, 1.0), description="share of an image's area in a training crop, from and to (default [0.08, 1.0])"
    )
    flip: bool = Field(True, description="mirror every second training crop")
    encode: Literal["sample", "mean"] = Field(
        "sample", description="latents in training: drawn from the autoencoder's distribution, or its mean"
    )
    validate_encode: Literal["sample", "mean"] = Field("mean", description="latents in validation")
    pool: int = Field(32, ge=2, description="images that batch normalisation takes together; it divides the batch")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of the images that is never trained on, only validated")
    validation: str | None = Field(
        None, description="images to validate with, as data.path (default none: those held out)"
    )
    decay_every: int | None = Field(
        None, ge=1, description="images after which the learning rate is multiplied by decay_factor (default none)"
    )
    decay_factor: float = Field(0.1, gt=0, le=1, description="that factor")


class LatentClassifierMethod(Method[LatentClassifierOptions]):
    name = "latent-classifier"
    Options = LatentClassifierOptions
    data = "images"
    product = "classifier"

    def __init__(self, setup: Setup[LatentClassifierOptions]):
        images = setup.images
        assert images is not None and not isinstance(images, LatentSet | TripletSet)
        self.options, self.images, self.batch, self.licence = setup.options, images, setup.batch, setup.licence
        if setup.device.type != "meta":
            need_classes(images, self.name)
        low, high = self.options.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"latent_classifier.crop_scale: expected 0 < from <= to <= 1, got [{low}, {high}]")
        size = self.options.image_size
        if size > min(images.shape[1:]):
            what = f"{images.shape[2]} x {images.shape[1]} pixels"
            raise UserError(
                f"latent_classifier.image_size: crops of {size} pixels are larger than the images of {what}",
                "give data.resolution, or a smaller image_size",
            )
        self.space = load_space(self.options.space, setup.device)
        if images.shape[0] != 3 and self.space.name != PIXELS:
            raise UserError(f"{images.name} is grey, and the autoencoder takes colour", "data.channels: 3 repeats it")
        if size % self.space.numbers.factor:
            raise UserError(
                f"latent_classifier.image_size: {size} is no multiple of {self.space.numbers.factor} pixels"
            )
        pixels = self.space.name == PIXELS
        channels = images.shape[0] if pixels else self.space.numbers.channels
        network = build_network(
            {
                "arch": "latent_classifier",
                "channels": channels,
                **({"classes": images.classes} if images.classes else {}),
                "pixels": pixels,
                **(setup.network or {}),
            }
        )
        if not isinstance(network, LatentClassifier):
            raise UserError("network.arch: method latent-classifier trains latent_classifier")
        if images.classes and network.classes != images.classes:
            raise UserError(f"network.classes: {network.classes}, and {images.name} has {images.classes}")
        if network.channels != channels or network.config["pixels"] != pixels:
            raise UserError(f"network: channels and pixels are those of space {self.space.name}; leave them away")
        self.network, self.classes = network, network.classes
        self.latent = (channels, size // self.space.numbers.factor, size // self.space.numbers.factor)
        self.split(setup)

    def split(self, setup: Setup[LatentClassifierOptions]) -> None:
        """Which images are trained on, and which validated."""
        bare = setup.device.type == "meta"  # for a plan, which may do without the images
        self.train_indices, self.held_indices = hold_out(
            0 if bare else len(self.images), self.options.holdout, setup.seed
        )
        self.validation: ImageSet | None = None
        if self.options.validation is not None and not bare:
            channels, resolution, _ = self.images.shape
            found = open_images(self.options.validation, resolution=resolution, channels=channels)
            if found.class_names != self.images.class_names:
                raise UserError(f"latent_classifier.validation: {found.name} has other classes than {self.images.name}")
            self.validation = found

    @classmethod
    def micro_multiple(cls, options: LatentClassifierOptions, batch: int) -> int:
        return min(options.pool, batch)

    def players(self) -> dict[str, nn.Module]:
        return {"classifier": self.network}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses, right, network = [], [], loop.net("classifier")
        statistics = self.network.statistics = RunningStatistics(network, self.options.pool)
        for micro, draw in loop.micro_batches(batch):
            labels = micro.condition.labels
            assert micro.images is not None and labels is not None
            crops = random_crops(
                micro.images, draw.rand(5), self.options.image_size, self.options.crop_scale, self.options.flip
            )
            x = self.encoded(crops, draw.randn(*self.latent), self.options.encode)
            found = network(x)
            loss = F.cross_entropy(found, labels)
            loop.backward(loss)
            losses.append(loss)
            right.append((found.argmax(1) == labels).float().mean())
        statistics.finish(loop.everywhere)
        self.network.statistics = None
        loop.update("classifier")
        return {"loss": loop.mean(losses), "train_accuracy": loop.mean(right)}

    def encoded(self, images: Tensor, noise: Tensor, how: str) -> Tensor:
        return self.space.encode(images, noise if how == "sample" else torch.zeros_like(noise))

    def rate(self, iteration: int) -> float:
        every = self.options.decay_every
        return 1.0 if every is None else self.options.decay_factor ** (iteration * self.batch // every)

    def describe(self) -> JsonObject:
        return {
            "kind": "latent_classifier",
            "network": self.network.config,
            "space": self.space.record if self.space.name != PIXELS else {"name": PIXELS},
            "licence": self.licence,
        }

    @torch.inference_mode()
    def validate(self, product: nn.Module) -> dict[str, float]:
        """Top-1 of the centre crops that were not trained on, 0 to 1."""
        images = self.validation or self.images
        indices = torch.arange(len(images)) if self.validation is not None else self.held_indices
        if not len(indices):
            return {}
        assert images.labels is not None
        training = product.training
        product.eval()
        device, right = next(product.parameters()).device, 0
        noise = torch.Generator().manual_seed(0)
        for part in indices.split(self.options.pool):
            x = centre_crops(to_float(images.images(part)).to(device), self.options.image_size)
            drawn = torch.randn(len(part), *self.latent, generator=noise).to(device)
            predicted = product(self.encoded(x, drawn, self.options.validate_encode)).argmax(1).cpu()
            right += int((predicted == images.labels[part]).sum())
        product.train(training)
        return {"accuracy": right / len(indices)}


METHOD = LatentClassifierMethod
