"""LatentLPIPS' second stage: weights of the channels of a classifier's maps, learned from which of two distorted copies
is nearer (Zhang et al. 2018, on latents: Kang et al. 2024, section 3.2, Table A3)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.data.images import to_float
from d2o.data.triplets import TripletSet, open_triplets
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.assets import asset
from d2o.interop.checkpoint_record import check_checkpoint
from d2o.interop.safetensors_io import load_file, read_meta, resolve_checkpoint
from d2o.losses.latent_lpips import SHIPPED
from d2o.losses.perceptual import single, unit
from d2o.losses.two_afc import REAL, agreement, ranking_inputs, weighted
from d2o.methods.base import Batch, Loop, Method, Options, Setup
from d2o.methods.holdout import hold_out
from d2o.networks.latent_vgg import Taps, TunedVGG
from d2o.networks.load import load_weights
from d2o.networks.ranking import RankingHead
from d2o.networks.vgg_classifier import LatentClassifier
from d2o.spaces.load import load_space


class LatentLpipsOptions(Options):
    space: str = Field(description="latent space: sd15, sd21, sdxl, sd3, flux, tiny-sd, or where an autoencoder lies")
    trunk: str = Field(
        description=(
            "run folder or checkpoint of method latent-classifier (or of this one) whose trunk is taken; tiny-sd: that"
            " of the distance that ships"
        )
    )
    taps: Taps = Field("official", description="the last two maps after their pooling, or pre_pool: before it")
    encode: Literal["sample", "mean"] = Field(
        "sample", description="latents in training: drawn from the autoencoder's distribution, or its mean"
    )
    validate_encode: Literal["sample", "mean"] = Field("mean", description="latents in validation")
    dropout: float = Field(0.5, ge=0, lt=1, description="share of the squared differences left out in training")
    constant_epochs: int = Field(5, ge=0, description="epochs at the full learning rate")
    decay_epochs: int = Field(5, ge=1, description="epochs after those, of linear decay: a step after each")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of the triplets that is only validated")
    validation: str | None = Field(
        None, description="triplets to validate with, as data.path (default none: those held out)"
    )


class LatentLpipsMethod(Method[LatentLpipsOptions]):
    name = "latent-lpips"
    Options = LatentLpipsOptions
    data = "images"
    triplets = True
    product = "distance"

    def __init__(self, setup: Setup[LatentLpipsOptions]):
        assert setup.images is not None
        self.options, self.batch, self.licence = setup.options, setup.batch, setup.licence
        self.images = cast(TripletSet, setup.images)
        self.space = load_space(self.options.space, setup.device)
        channels, height, width = self.images.shape
        factor = self.space.numbers.factor
        if channels != 9:
            raise UserError(f"{self.images.name} is grey, and the autoencoder takes colour", "data.channels: 3")
        if height % factor or width % factor or min(height, width) < 4 * factor:
            raise UserError(
                f"{self.images.name} has pictures of {width} x {height}; the distance takes multiples of {factor}"
                f" pixels from {4 * factor} on",
                "data.resolution resizes them",
            )
        self.latent = (3 * self.space.numbers.channels, height // factor, width // factor)
        self.distance, self.ranking = self.with_trunk(setup), RankingHead()
        planned = setup.device.type == "meta"
        n = 0 if planned else len(self.images)
        self.train_indices, self.held_indices = hold_out(n, self.options.holdout, setup.seed)
        self.epoch = max(len(self.train_indices), 1)
        self.validation: TripletSet | None = None
        if self.options.validation is not None and not planned:
            found = open_triplets(self.options.validation, resolution=height, channels=3)
            if found.shape != self.images.shape:
                raise UserError(f"latent_lpips.validation: pictures of {found.name} differ in shape from the data's")
            self.validation = found

    def with_trunk(self, setup: Setup[LatentLpipsOptions]) -> TunedVGG:
        """The network with the trunk of `options.trunk`, frozen, and new heads. UserError: another file, or a trunk of
        another space."""
        where, space = self.options.trunk, self.space
        if setup.network:
            raise UserError("network: the distance has the form of its trunk", "leave it away")
        if setup.device.type == "meta" and where not in SHIPPED and not Path(where).exists():
            return TunedVGG(space.numbers.channels, taps=self.options.taps).requires_grad_(
                False
            )  # made before training
        path = asset(SHIPPED[where]) if where in SHIPPED else resolve_checkpoint(Path(where))
        kind = read_meta(path).get("kind")
        if kind not in ("latent_classifier", "latent_lpips"):
            raise UserError(
                f"latent_lpips.trunk: {path} holds a {kind or 'foreign object'}", "train one: latent_classifier.yaml"
            )
        tensors, meta = load_file(path)
        check_checkpoint(meta, path)
        if setup.device.type != "meta":  # a plan reads no autoencoder
            space.check({"name": meta["space"]["name"], "sha256": meta["space"].get("sha256")}, str(path))
        if space.published and meta["space"]["name"] != space.name:
            raise UserError(f"latent_lpips.trunk: {path} is for latents of {meta['space']['name']}, not {space.name}")
        found = load_weights(meta["network"], tensors, path)
        if isinstance(found, LatentClassifier):
            trunk, norm = found.trunk, bool(found.config["batch_norm"])
        elif isinstance(found, TunedVGG):
            trunk, norm = found.net, bool(found.config["batch_norm"])
        else:
            raise UserError(f"latent_lpips.trunk: {path} holds a {type(found).__name__}")
        if trunk.channels != space.numbers.channels or trunk.pixels:
            raise UserError(f"latent_lpips.trunk: {path} was trained on other inputs than latents of {space.name}")
        network = TunedVGG(space.numbers.channels, norm, self.options.taps, trunk.widths[0])
        network.net.load_state_dict(trunk.state_dict())
        network.net.requires_grad_(False)
        with torch.no_grad():
            for head in head_weights(network):
                head.abs_()  # weights are not negative, from the start
        return network

    def players(self) -> dict[str, nn.Module]:
        return {"distance": self.distance, "ranking": self.ranking}

    def step(self, loop: Loop, batch: Batch, iteration: int) -> dict[str, Tensor]:
        losses, scores = [], []
        network = cast(TunedVGG, loop.net("distance"))
        network.net.eval()  # its batch normalisation is frozen with it
        for micro, draw in loop.micro_batches(batch):
            assert micro.images is not None and micro.target is not None
            z = self.encoded(micro.images, draw.randn(*self.latent), self.options.encode)
            distances = []
            differences = squares(network, z)
            for pair in differences:
                kept = [self.kept(draw.rand(*square.shape[1:])) for square in pair]
                distances.append(weighted(pair, network.weights, kept))
            logits = loop.net("ranking")(ranking_inputs(*distances))
            loss = F.binary_cross_entropy_with_logits(logits, micro.target)
            loop.backward(loss)
            losses.append(loss)
            scores.append(agreement(distances[0], distances[1], micro.target).mean())
        loop.update("distance")
        loop.update("ranking")
        with torch.no_grad():
            for head in head_weights(network):
                head.clamp_(min=0)
        return {"loss": loop.mean(losses), "train_2afc": loop.mean(scores)}

    def kept(self, numbers: Tensor) -> Tensor:
        """Factors of dropout from uniform numbers of [0, 1)."""
        return (numbers >= self.options.dropout).float() / (1 - self.options.dropout)

    def encoded(self, images: Tensor, noise: Tensor, how: str) -> Tensor:
        """Triplets [n, 9, H, W] -> latents [n, 3, c, h, w]."""
        n, (triple, height, width) = len(images), self.latent
        noise = noise.reshape(3 * n, triple // 3, height, width)
        flat = images.reshape(3 * n, 3, *images.shape[2:])
        z = self.space.encode(flat, noise if how == "sample" else torch.zeros_like(noise))
        return z.reshape(n, 3, triple // 3, height, width)

    def rate(self, iteration: int) -> float:
        epoch = iteration * self.batch // self.epoch
        return max(0.0, 1 - max(0, epoch - self.options.constant_epochs) / self.options.decay_epochs)

    def describe(self) -> JsonObject:
        space = self.space.record
        return {"kind": "latent_lpips", "network": self.distance.config, "space": space, "licence": self.licence}

    @torch.inference_mode()
    def validate(self, product: nn.Module) -> dict[str, float]:
        """2AFC: the share of judgements that the distance shares, 0 to 1; the mean over the kinds of distortion, and
        each of them."""
        images = self.validation or self.images
        held = torch.arange(len(images)) if self.validation is not None else self.held_indices
        if not len(held):
            return {}
        training = product.training
        product.eval()
        network, numbers = cast(TunedVGG, product), torch.Generator().manual_seed(0)
        found = {}
        for kind, rows in images.groups.items():
            scores, mine = [], rows[torch.isin(rows, held)]
            for part in mine.split(256) if len(mine) else ():
                noise = torch.randn(len(part), *self.latent, generator=numbers).to(self.space.device)
                x = to_float(images.images(part)).to(self.space.device)
                d0, d1 = (
                    weighted(pair, network.weights)
                    for pair in squares(network, self.encoded(x, noise, self.options.validate_encode))
                )
                scores.append(agreement(d0.cpu(), d1.cpu(), images.judgements[part]))
            if scores:
                found[kind] = float(torch.cat(scores).mean())
        product.train(training)
        mean = sum(found.values()) / len(found)
        if found.keys() >= set(REAL):  # BAPPS' own name for what real algorithms distort
            found["real"] = sum(found[kind] for kind in REAL) / len(REAL)
        return {"accuracy": mean, **{f"2afc_{kind}": score for kind, score in found.items()}}


def head_weights(network: TunedVGG) -> list[Tensor]:
    """The weights that are trained, [1, C, 1, 1] each."""
    return [p for name, p in network.named_parameters() if not name.startswith("net.")]


def squares(network: TunedVGG, z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Latents [n, 3, c, h, w] -> of both copies the squared differences of the normalised maps to the reference's,
    without gradients: the trunk is frozen."""
    with torch.no_grad():
        maps = [unit(single(f)).unflatten(0, (len(z), 3)) for f in network(z.flatten(0, 1))]
        return [(f[:, 1] - f[:, 0]).square() for f in maps], [(f[:, 2] - f[:, 0]).square() for f in maps]


METHOD = LatentLpipsMethod
