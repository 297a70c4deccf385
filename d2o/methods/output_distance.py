"""The distance between a student's output and the teacher's that a recipe names (Kang et al. 2024, Table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from d2o.errors import UserError
from d2o.features.base import check_shape
from d2o.losses.latent_lpips import ELatentLPIPS, LatentLPIPS, OneDraw, load_latent_lpips
from d2o.losses.perceptual import Perceptual, Target, load_lpips, load_perceptual
from d2o.losses.regression import LOSSES, distance
from d2o.methods.base import Draws, Options
from d2o.spaces.base import LatentSpace
from d2o.spaces.load import SPACES, TINY_SD, load_space
from d2o.teachers.base import Spec

DistanceKind = Literal["mse", "l1", "pseudo_huber", "lpips", "perceptual", "latent_lpips", "e_latent_lpips"]


class DistanceOptions(Options):
    """`distance:` of a method that regresses to pairs."""

    kind: DistanceKind = Field(
        "e_latent_lpips",
        description=(
            "mse, l1, pseudo_huber; lpips or perceptual (of any features) of images, those of latents by the space's"
            " decoder; latent_lpips, e_latent_lpips (eq. 3) of latents"
        ),
    )
    huber_reduce: Literal["vector", "element"] = Field(
        "vector", description="pseudo-Huber norm over the whole sample, or value by value"
    )
    extractor: str | None = Field(None, description="features of the perceptual distance (name or path)")
    trunk: Literal["vgg", "alex", "squeeze"] = Field("vgg", description="network of lpips")
    pooling: Literal["max", "avg"] = Field(
        "max", description="pooling of lpips: the trunk's own maxima, or averages over the same windows"
    )
    size: int | None = Field(
        None,
        ge=1,
        description="pixels to which lpips and perceptual resize images (CIFAR-10: 224); null: as the features do",
    )
    weights: str | None = Field(
        None,
        description="file of the network of lpips, perceptual, latent_lpips or e_latent_lpips; null: it is looked for",
    )
    space: Literal["sd15", "sd21", "sdxl", "sd3", "flux", "tiny-sd"] | None = Field(
        None,
        description=(
            "latent space whose LatentLPIPS is taken, for a teacher (a folder, a repository) whose autoencoder is that"
            " of a published model; null: the teacher's own"
        ),
    )
    taps: Literal["official", "pre_pool"] | None = Field(
        None,
        description="last two maps of LatentLPIPS: after its poolings (official) or before; null: as it was trained",
    )
    augment: str = Field("bgco", description="E-LatentLPIPS' transforms: of b, g, c, o, or none (SD-CFG-3: bg+cutout)")
    resample: Literal["sym6", "bilinear"] = Field("sym6", description="how transforms b and g read latents")
    n_draws: int = Field(1, ge=1, description="transforms of a sample in an iteration, over which the loss is averaged")
    vanilla: Literal["none", "sum", "mean"] = Field(
        "none", description="LatentLPIPS of the unchanged latents too: added, or averaged with the other (SD-CFG-3)"
    )
    vanilla_weight: float = Field(1.0, ge=0, description="weight of that part")
    l1: float = Field(
        0.0,
        ge=0,
        description="weight of mean |a - b| of the latents beside (E-)LatentLPIPS (the authors' code: 1, the paper: 0)",
    )


class MakesSamples(Protocol):
    """A teacher, or what else says of samples what they are."""

    @property
    def spec(self) -> Spec: ...

    @property
    def space(self) -> LatentSpace: ...


class OutputDistance:
    """d(x, y) [B] of samples [B, C, H, W] in the space of `teacher`; `network`: what it looks through, frozen.

    UserError: a distance that does not go with the teacher's samples, weights that are not to be had.
    """

    def __init__(self, options: DistanceOptions, teacher: MakesSamples, device: torch.device, key: str):
        self.options = options
        self.network: nn.Module | None = None
        spec, o = teacher.spec, options
        path = None if o.weights is None else Path(o.weights)
        if o.kind in ("latent_lpips", "e_latent_lpips"):
            if not spec.latent:
                raise UserError(
                    f"{key}.kind: {o.kind} compares latents, and teacher {spec.name!r} makes images",
                    f"{key}.kind: lpips, perceptual or mse",
                )
            plain = load_latent_lpips(asked_space(o, spec, key), path, o.l1, device, o.taps)
            self.network = plain
            if o.kind == "e_latent_lpips":
                self.network = ELatentLPIPS(
                    plain,
                    o.augment,
                    vanilla=o.vanilla,
                    vanilla_weight=o.vanilla_weight,
                    resample=o.resample,
                    n_draws=o.n_draws,
                )
        elif o.kind in ("lpips", "perceptual"):
            space = teacher.space if spec.latent else None
            if o.kind == "lpips":
                self.network = load_lpips(device, o.trunk, o.pooling, path, o.size, space)
            else:
                if o.extractor is None:
                    raise UserError(
                        f"{key}.extractor: the perceptual distance needs features",
                        f"for example {key}.extractor: lite0",
                    )
                judge = load_perceptual(o.extractor, device, path, o.size, space)
                if not spec.latent and o.size is None:
                    check_shape(spec.shape, judge.features, of="the teacher's samples")
                self.network = judge

    def draw(self, draw: Draws) -> Sequence[OneDraw] | None:
        """The random numbers of one comparison of a micro-batch."""
        return self.network.draw(draw.randn, draw.rand) if isinstance(self.network, ELatentLPIPS) else None

    def target(self, y: Tensor) -> Tensor | Target:
        """y [B, C, H, W] for several comparisons: decoded and looked at once, where no random transform comes before
        that."""
        if isinstance(self.network, ELatentLPIPS):
            return self.network.distance.target(y)  # the transforms take y itself, LatentLPIPS beside them its maps
        return self.network.target(y) if isinstance(self.network, LatentLPIPS | Perceptual) else y

    def __call__(self, x: Tensor, y: Tensor | Target, draws: Sequence[OneDraw] | None = None) -> Tensor:
        """y: samples of the shape of x, or what `target` made of them."""
        if self.options.kind in LOSSES:
            y = y.y if isinstance(y, Target) else y
            return distance(self.options.kind, x, y, self.options.huber_reduce)
        assert self.network is not None
        return self.network(x, y, draws) if isinstance(self.network, ELatentLPIPS) else self.network(x, y)


def asked_space(options: DistanceOptions, spec: Spec, key: str) -> str:
    """The latent space whose LatentLPIPS compares samples of that spec. UserError: it has other channels than they."""
    if options.space is None:
        return spec.space
    channels = load_space(TINY_SD).numbers.channels if options.space == TINY_SD else SPACES[options.space].channels
    if channels != spec.shape[0]:
        raise UserError(
            f"{key}.space: latents of {options.space} have {channels} channels, and teacher {spec.name!r} makes"
            f" {spec.shape[0]}",
            f"{key}.space: that of the teacher's own autoencoder",
        )
    return options.space
