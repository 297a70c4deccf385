"""`critic:` of a method's section that trains a generator against one of several critics, read by `build`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from d2o.critics.mixing import WIDTH
from d2o.critics.projected import POOL, PUBLISHED
from d2o.critics.style import MBSTD_GROUP
from d2o.errors import UserError
from d2o.features.backbone import SIZE
from d2o.features.load import BACKBONES
from d2o.inputs import JsonObject
from d2o.networks.minibatch_std import group_size
from d2o.settings.section import Count, NonEmpty, Resolution, Section, Seed, field

CLASSES = "imagenet-lite0-classes"
"""The weights that conditional heads begin with."""
OF = {
    "projected": ("backbones", "embedding", "bn_probe", "pool", "diffaug", "size", "width", "seed", "weights"),
    "style": ("style", "pretrained", "diffaug"),
    "vgg16": ("trunk", "freeze_trunk", "diffaug", "size", "weights"),
    "lpips": ("trunk", "freeze_trunk", "diffaug", "size", "weights"),
}
"""Kind -> the keys that it reads."""


class CriticSection(Section):
    """Which critic, and what it looks at images through."""

    kind: Literal["projected", "style", "vgg16", "lpips"] = field(
        "projected",
        "projected features under small heads; StyleGAN2's; VGG-16, trained on; or the same with logits of each of the"
        " maps that LPIPS compares",
    )
    backbones: tuple[NonEmpty, ...] = field(
        PUBLISHED,
        f"projected: the frozen networks, each under heads of its own, of {', '.join(BACKBONES)}"
        f" (default {list(PUBLISHED)})".replace("'", '"'),
    )
    size: Resolution = field(
        SIZE,
        "pixels that images are resized to before a backbone, published: 224, or those of the data if they are more;"
        " EfficientNets take 64 and more, DeiT its own alone",
    )
    width: Count = field(
        WIDTH, "projected: channels of the finest level behind the random projections; of the rest in proportion"
    )
    embedding: Literal["imagenet_lite0", "learned"] = field(
        "imagenet_lite0",
        "projected, with classes: what each head begins to know of them, from a published table of ImageNet's 1000"
        " classes (label k is row k), or nothing",
    )
    bn_probe: bool = field(
        False,
        "projected: the backbones' batch norms are moved by a tenth towards an image of zeros, as a slip of the"
        " published code does",
    )
    pool: Count | Literal["batch"] = field(
        POOL,
        "projected: images that a batch norm of the heads takes together (as one of the published run's 8 GPUs, whose"
        " ImageNet runs have 64), where it does not divide the batch the largest divisor below; batch: all of an"
        " iteration",
    )
    diffaug: bool = field(False, "DiffAugment of real and made images, anew for each backbone; not in R1")
    seed: Seed = field(0, "projected: of the frozen random projections, which are stored with the critic")
    weights: dict[NonEmpty, NonEmpty] = field(
        {}, "files of weights by the name of a backbone, a trunk or imagenet-lite0-classes, instead of those found"
    )
    trunk: NonEmpty = field(
        "lpips-vgg", "vgg16, lpips: the network that is trained on; a backbone may stand in for it, at `size` pixels"
    )
    freeze_trunk: bool = field(
        False, "vgg16, lpips: that network is held fixed, and the layers on it alone are trained"
    )
    style: JsonObject = field({}, "style: options of the critic (blocks, base, max_channels, mbstd_group, ...)")
    pretrained: NonEmpty | None = field(
        None, "style: a run of spi-gan whose critic is the one to begin with, as its state has it"
    )

    def together(self, batch: int) -> int:
        """Images of a batch that it looks at together, for `Method.micro_multiple`."""
        if self.kind == "projected":
            return group_size(None if self.pool == "batch" else self.pool, batch)
        return group_size(self.style.get("mbstd_group", MBSTD_GROUP), batch) if self.kind == "style" else 1

    def named(self) -> list[str]:
        """What `weights` may name."""
        if self.kind != "projected":
            return [self.trunk]
        return [*self.backbones, *([CLASSES] if self.embedding == "imagenet_lite0" else [])]

    def file(self, name: str) -> Path | None:
        """The file of weights that the recipe names for it."""
        return Path(self.weights[name]) if name in self.weights else None

    def check(self) -> None:
        """UserError: settings that this kind does not read, or that do not go together."""
        read = OF[self.kind]
        for key, of in type(self).model_fields.items():
            if key != "kind" and key not in read and getattr(self, key) != of.default:  # resolved recipes list them all
                raise UserError(f"critic.{key}: kind {self.kind} does not read it", f"it reads {', '.join(read)}")
        if self.kind in ("vgg16", "lpips") and self.size != SIZE and self.trunk not in BACKBONES:
            raise UserError(
                f"critic.size: {self.trunk} looks at images as they are, at no size of its own",
                f"leave it away; backbones that stand in for it are resized for: {', '.join(BACKBONES)}",
            )
        if unknown := [name for name in self.weights if name not in self.named()]:
            raise UserError(
                f"critic.weights: {unknown[0]!r} is nothing that this critic looks through",
                f"it looks through {', '.join(self.named())}",
            )
        if self.pretrained is not None and self.style:
            raise UserError("critic.style: the options of a pretrained critic are those of its run", "leave it away")
