"""GDD's critic: projected features of frozen networks under small trained heads (Zheng & Yang 2024, arXiv 2405.20750,
appendix B.4; Sauer et al. 2021, "Projected GANs Converge Faster")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.augment.diffaug import SampleDraws, diffaugment
from d2o.critics.mixing import WIDTH, Mixing
from d2o.critics.official_names import own_names
from d2o.critics.projected_heads import LAST, NOMINAL, ROWS, STEPS, TABLE, ProjectedHead
from d2o.errors import UserError
from d2o.features import Backbone, load_backbone
from d2o.features.backbone import SIZE, probe
from d2o.features.common import at_once
from d2o.networks.frozen_conv import hold_convolutions
from d2o.networks.pooled_norm import settle_norms
from d2o.networks.spectral_conv import settle_sigmas

PUBLISHED = ("vgg16_bn", "tf_efficientnet_lite0")
"""The backbones of CIFAR-10; other data have DeiT in the first one's place."""
POOL = 32
"""Images that a batch norm of the heads takes together: those of one of the 8 GPUs of the published runs (ImageNet:
64)."""
ALIASES = {"lite0": "tf_efficientnet_lite0", "deit": "deit_base_distilled_patch16_224"}


class ProjectedCritic(nn.Module):
    """critic(x [B, C, H, W] in [-1, 1], labels [B] or None, draws or None) -> logits, of each backbone [B, M], high for
    real.

    `backbones`: names of `d2o.features.load.BACKBONES`, or pairs of a name and a `Backbone`; `weights`: files of those
    names, instead of the ones that are found. Each has its random projections (`Mixing`, drawn by `seed`, stored with
    the critic) and four heads, whose logits are in a row, finest level first. `size` that images are resized to, as
    published 224, or that of the data where it is more; below 224 the heads are as deep as the maps allow, from 512 on
    they are one halving deeper, and so on. `width`: channels of the finest level behind the projections, of the
    rest in proportion. `classes` of conditional heads (0: none) and their `embedding`: "imagenet_lite0" (each head
    trains a copy of `table` [1000, 320]; None: drawn at random) or "learned".
    `bn_probe`: the backbones' batch norms are moved as in the published critic (`d2o.features.backbone.probe`).
    `pool`: images that batch norms of the heads take together (None: the whole batch), see `PooledBatchNorm`.
    `diffaug`: DiffAugment, for each backbone by itself, where a call brings `draws`.

    Batch norm makes a logit depend on the other images of the pool: real and made ones are looked at in calls of their
    own. After an iteration `settle` has to be called, for what moves once an iteration: running statistics and the
    power iterations of spectral normalisation. The published critic computes in float32. UserError: unknown names;
    absent weights; a map too small for a head.
    """

    def __init__(
        self,
        backbones: Sequence[str | tuple[str, Backbone]] = PUBLISHED,
        classes: int = 0,
        embedding: str = "imagenet_lite0",
        weights: Mapping[str, str | Path] | None = None,
        bn_probe: bool = False,
        *,
        size: int = SIZE,
        width: int = WIDTH,
        pool: int | None = POOL,
        diffaug: bool = False,
        seed: int = 0,
        table: Tensor | None = None,
        device: str | torch.device = "cpu",
    ):
        super().__init__()
        if not backbones:
            raise UserError("critic.backbones: none given", "the published ones: " + ", ".join(PUBLISHED))
        self.classes, self.diffaug = classes, diffaug
        self.names, found = [], []
        for given in backbones:
            name, backbone = given if isinstance(given, tuple) else (given, None)
            if backbone is None:
                file = (weights or {}).get(name)
                backbone = load_backbone(name, device, None if file is None else Path(file), size)
            if bn_probe:
                probe(backbone)
            hold_convolutions(backbone)
            self.names.append(ALIASES.get(name, name))
            found.append(backbone)
        self.backbones = nn.ModuleList(found)
        self.mixing = nn.ModuleList(Mixing(b.channels, b.grid, seed + i, width) for i, b in enumerate(found)).to(device)
        self.heads = nn.ModuleList()
        for i, backbone in enumerate(found):
            sides = [None] * len(STEPS) if backbone.size >= SIZE else self.sides(i)
            more = max(0, int(math.log2(backbone.size / NOMINAL)))
            heads = [ProjectedHead(i, side, pool, classes, embedding, width, more) for i, side in enumerate(sides)]
            self.heads.append(nn.ModuleList(heads).to(device))
        if table is not None:
            self.begin_classes(table)

    def forward(self, x: Tensor, labels: Tensor | None = None, draws: SampleDraws | None = None) -> list[Tensor]:
        logits = []
        for i, heads in enumerate(self.heads):
            seen = diffaugment(x, draws) if self.diffaug and draws is not None else x
            maps = self.look(i, seen)
            logits.append(torch.cat([head(y, labels) for head, y in zip(heads, maps, strict=True)], 1))  # type: ignore[call-overload]
        return logits

    def logits(self, x: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Of each backbone [B, M]: without augmentation, as R1 takes them."""
        return self(x, labels)

    def features(self, x: Tensor) -> list[list[Tensor]]:
        """What the heads are given: of each backbone four maps."""
        return [self.look(i, x) for i in range(len(self.backbones))]

    def look(self, i: int, x: Tensor) -> list[Tensor]:
        """The four maps of backbone i. On a CPU a few images at a time, so that they stay in its cache."""
        backbone, mixing = self.backbones[i], self.mixing[i]
        assert isinstance(backbone, Backbone)
        parts = x.split(at_once(x.device, backbone.size)) if x.device.type == "cpu" else (x,)
        found = [mixing(backbone.maps(part)) for part in parts]
        return found[0] if len(found) == 1 else [torch.cat(maps) for maps in zip(*found)]

    def settle(self) -> None:
        """The end of an iteration; all processes call this."""
        settle_norms(self)
        settle_sigmas(self)

    @torch.no_grad()
    def sides(self, i: int) -> list[int | None]:
        """The sides of the maps of backbone i. UserError: one below the heads' last convolution."""
        backbone = self.backbones[i]
        assert isinstance(backbone, Backbone)
        blank = torch.zeros(1, backbone.takes[-1], backbone.size, backbone.size, device=backbone.mean.device)
        sides = [min(y.shape[2:]) for y in self.look(i, blank)]
        if min(sides) < LAST:
            raise UserError(
                f"critic.size: {self.names[i]} at {backbone.size} pixels ends in {min(sides)}x{min(sides)},"
                f" and the heads need {LAST}x{LAST}",
                "a larger size; EfficientNets need 64",
            )
        return list(sides)

    @torch.no_grad()
    def begin_classes(self, table: Tensor) -> None:
        """Let each conditional head begin with a copy of the table [1000, 320]."""
        if tuple(table.shape) != (ROWS, TABLE):
            raise UserError(f"a table of ImageNet's classes is {ROWS} x {TABLE}, not {tuple(table.shape)}")
        for part in self.modules():
            if isinstance(part, nn.Embedding) and part.weight.shape == table.shape:
                part.weight.copy_(table)

    @torch.no_grad()
    def load_official(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a published critic, by the official names; all but those of the backbones, which have
        their own files. UserError: some are missing, or of another critic."""
        own = self.state_dict(keep_vars=True)
        depths = [[len(head.blocks) for head in heads] for heads in self.heads]  # type: ignore[union-attr, attr-defined]
        names = own_names(self.names, depths, own)
        if missing := [theirs for theirs in names if theirs not in tensors]:
            raise UserError(f"these are not the tensors of this critic: {missing[0]!r} is not there")
        for theirs, ours in names.items():
            if own[ours].shape != tensors[theirs].shape:
                shapes = f"{tuple(tensors[theirs].shape)}, not {tuple(own[ours].shape)}"
                raise UserError(f"these are not the tensors of this critic: {theirs!r} has the shape {shapes}")
            own[ours].copy_(tensors[theirs])
