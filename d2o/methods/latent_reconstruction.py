"""How well a distance leads back to an image: latents that begin as noise are moved by Adam until the distance to those
of given images is small (Kang et al. 2024, section 3.2 and appendix B.1, Figs. 5 and A1).

A distance with a poor landscape stalls. All are judged by one: LatentLPIPS without augmentation, which only some of
them minimise, and by the pixels that the decoder makes of both latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.condition import Condition
from d2o.data.images import to_float
from d2o.data.stored_latents import LatentSet
from d2o.data.triplets import TripletSet
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.losses.latent_lpips import load_latent_lpips
from d2o.losses.perceptual import Target
from d2o.methods.base import Batch, Loop, Method, Options, Setup
from d2o.methods.output_distance import DistanceOptions, OutputDistance
from d2o.networks.free_latents import FreeLatents
from d2o.spaces.base import PIXELS, LatentSpace
from d2o.spaces.load import load_space
from d2o.teachers.base import Spec


class LatentReconstructionOptions(Options):
    space: str = Field(description="latent space: sd15, sd21, sdxl, sd3, flux, tiny-sd, or where an autoencoder lies")
    distance: DistanceOptions = Field(
        DistanceOptions.model_validate({}), description="distance to the latents of the images, which is minimised"
    )
    latents: Literal["scaled", "raw"] = Field(
        "scaled",
        description=(
            "what Adam moves, and begins as standard normal noise: latents as the diffusion model sees them, or raw,"
            " as the autoencoder gives them (the authors' code); either way the distance sees the former"
        ),
    )
    encode: Literal["sample", "mean"] = Field(
        "sample", description="latents of the images: drawn once from the autoencoder's distribution, or its mean"
    )
    judge: str | None = Field(
        None, description="file of the LatentLPIPS that judges all distances (default none: the space's own)"
    )


class InSpace(NamedTuple):
    """What the samples of an `OutputDistance` are, where no teacher makes them."""

    spec: Spec
    space: LatentSpace


class LatentReconstruction(Method[LatentReconstructionOptions]):
    """`batch` is the number of images, the first of the data; row i of every batch is latent i. An iteration is a step
    of all of them."""

    name = "latent-reconstruction"
    Options = LatentReconstructionOptions
    data = "images"
    product = "latents"

    def __init__(self, setup: Setup[LatentReconstructionOptions]):
        images, o = setup.images, setup.options
        assert images is not None and not isinstance(images, LatentSet | TripletSet)
        self.options, self.licence, planned = o, setup.licence, setup.device.type == "meta"
        self.space = space = load_space(o.space, setup.device)
        channels, height, width = images.shape
        factor = space.numbers.factor
        if space.name == PIXELS:
            raise UserError(f"{self.name}.space: pixels are no latents", "name the space of an autoencoder")
        if channels != 3:
            raise UserError(f"{images.name} is grey, and the autoencoder takes colour", "data.channels: 3 repeats it")
        if height % factor or width % factor or min(height, width) < 4 * factor:
            raise UserError(
                f"{images.name} has pictures of {width} x {height}; the distance takes multiples of {factor} pixels"
                f" from {4 * factor} on",
                "data.resolution resizes them",
            )
        if not planned and len(images) < setup.batch:
            raise UserError(f"batch: {setup.batch} latents, and {images.name} has {len(images)} images")
        shape = (space.numbers.channels, height // factor, width // factor)
        self._spec = Spec(setup.name, shape, space.name, licence=setup.licence)
        self.latents = FreeLatents([setup.batch, *shape])
        generator = torch.Generator().manual_seed(setup.seed)  # what is loaded on the way draws from the global one
        first, noise = torch.randn(2, setup.batch, *shape, generator=generator, device="cpu").to(setup.device)
        noise = noise if o.encode == "sample" else torch.zeros_like(noise)
        if not planned:
            with torch.no_grad():
                self.latents.x.copy_(first)
        x = to_float(images.images(range(setup.batch))).to(setup.device) if not planned else noise
        self.target = space.encode(x, noise)
        self.distance = OutputDistance(o.distance, InSpace(self._spec, space), setup.device, f"{self.name}.distance")
        self.targets: dict[int, Tensor | Target] = {}  # of each micro-batch, by its first row
        judge = None if o.judge is None else Path(o.judge)
        self.judge = load_latent_lpips(o.distance.space or space.name, judge, device=setup.device)

    def players(self) -> dict[str, nn.Module]:
        return {"latents": self.latents}

    def frozen(self) -> dict[str, nn.Module]:
        return {"judge": self.judge} | ({} if self.distance.network is None else {"distance": self.distance.network})

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses = []
        for _, draw in loop.micro_batches(batch):
            rows = slice(draw.start, draw.start + draw.count)
            x = self.scaled(loop.net("latents")())[rows]
            if draw.start not in self.targets:
                self.targets[draw.start] = self.distance.target(self.target[rows])
            loss = self.distance(x, self.targets[draw.start], self.distance.draw(draw)).mean()
            loop.backward(loss)
            losses.append(loss)
        loop.update("latents")
        return {"loss": loop.mean(losses)}

    def scaled(self, x: Tensor) -> Tensor:
        """What is moved, as the diffusion model sees it."""
        return self.space.numbers.normalise(x) if self.options.latents == "raw" else x

    def spec(self) -> Spec:
        return self._spec

    def generate(self, product: nn.Module, noise: Tensor, condition: Condition) -> Tensor:
        """The images of the first latents, as many as there are noises, which play no part."""
        return self.space.decode(self.scaled(product()[: len(noise)]))

    def describe(self) -> JsonObject:
        raw = {"latents": "raw"} if self.options.latents == "raw" else {}  # the file holds what was moved
        return {
            "kind": "latents",
            "network": self.latents.config,
            "space": self.space.record,
            "licence": self.licence,
            **raw,
        }

    @torch.inference_mode()
    def validate(self, product: nn.Module) -> dict[str, float]:
        """LatentLPIPS to the images' latents, without augmentation; and the mean squared difference of what the decoder
        makes of both, values in [-1, 1]. Means over the images."""
        x = self.scaled(cast(Tensor, product()))
        shown = self.space.decode(x) - self.space.decode(self.target)
        return {
            "distance": float(self.judge(x, self.target).mean()),
            "pixel_mse": float(shown.square().mean()),
        }


METHOD = LatentReconstruction
