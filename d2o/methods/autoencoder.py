"""A variational autoencoder, whose latents a latent diffusion model is trained in (Rombach et al. 2022, section 3.1),
without a critic."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.methods.base import Batch, Loop, Method, Options, Setup
from d2o.networks.latent import Autoencoder


class AutoencoderOptions(Options):
    kl_weight: float = Field(
        1e-6,
        ge=0,
        description="weight of the KL divergence to N(0, 1), nats per pixel value, beside the mean absolute error",
    )


class AutoencoderMethod(Method[AutoencoderOptions]):
    name = "autoencoder"
    Options = AutoencoderOptions
    data = "images"
    product = "autoencoder"

    def __init__(self, setup: Setup[AutoencoderOptions]):
        self.licence = setup.licence
        assert setup.images is not None
        self.options = setup.options
        channels, resolution, _ = setup.images.shape
        config = {"in_channels": channels, "out_channels": channels, "sample_size": resolution, **setup.need_network()}
        if config.pop("arch", "autoencoder_kl") != "autoencoder_kl":
            raise UserError("network.arch: method autoencoder trains autoencoder_kl")
        if (config["in_channels"], config["out_channels"], config["sample_size"]) != (channels, channels, resolution):
            raise UserError(
                f"the network section asks for other images than the data has ({channels} x {resolution} x"
                f" {resolution})"
            )
        self.autoencoder = Autoencoder(**config)
        if resolution % self.autoencoder.factor:
            raise UserError(
                f"images of {resolution} pixels do not shrink by the {self.autoencoder.factor} of"
                " network.block_out_channels"
            )
        size = resolution // self.autoencoder.factor
        self.latent_shape = (self.autoencoder.vae.config.latent_channels, size, size)

    def players(self) -> dict[str, nn.Module]:
        return {"autoencoder": self.autoencoder}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses, errors, divergences, squares = [], [], [], []
        for micro, draw in loop.micro_batches(batch):
            x = micro.images
            assert x is not None
            y, mean, std = loop.net("autoencoder")(x, draw.randn(*self.latent_shape))
            error = (y - x).abs().mean()
            divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum() / x.numel()
            loss = error + self.options.kl_weight * divergence
            loop.backward(loss)
            losses.append(loss)
            errors.append(error)
            divergences.append(divergence)
            squares.append((y - x).square().mean())
        loop.update("autoencoder")
        psnr = 10 * (4 / loop.mean(squares)).log10()  # images span 2
        return {"loss": loop.mean(losses), "l1": loop.mean(errors), "kl": loop.mean(divergences), "psnr": psnr}

    def describe(self) -> JsonObject:
        return {"kind": "autoencoder", "network": self.autoencoder.config, "licence": self.licence}


METHOD = AutoencoderMethod
