"""From a plain configuration, or a section of a recipe, to a critic."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from d2o.critics.critic_section import CLASSES, CriticSection
from d2o.critics.dd_gan import DDGANCritic
from d2o.critics.pretrained import pretrained_critic
from d2o.critics.projected import ProjectedCritic
from d2o.critics.projected_heads import ROWS, TABLE
from d2o.critics.style import StyleCritic
from d2o.critics.style_judge import StyleJudge
from d2o.critics.trunks import LpipsCritic, VGG16Critic
from d2o.critics.unet import UNetCritic
from d2o.errors import UserError
from d2o.features import load_backbone, load_features
from d2o.features.load import BACKBONES
from d2o.interop.torch_files import read_tensors
from d2o.interop.weights import find_weights, want
from d2o.networks.build import build_network
from d2o.networks.config import Config

CRITICS: dict[str, type[nn.Module]] = {
    "ddgan_critic": DDGANCritic,
    "style_critic": StyleCritic,
    "unet_critic": UNetCritic,
}
"""arch -> class."""
ImageCritic = ProjectedCritic | StyleJudge | VGG16Critic | LpipsCritic
"""critic(x [B, C, H, W] in [-1, 1], labels [B] or None, draws or None) -> a list of logits [B, M], high for real. With
`draws` it augments, if its section says so. `settle()` is to be called at the end of an iteration (`Method.settle`)."""


def build_critic(config: Config) -> nn.Module:
    """`config` holds `arch` (one of `CRITICS`) and that critic's arguments. UserError: an unknown one, a bad value."""
    return build_network(config, plain=CRITICS)


def make_critic(
    section: CriticSection, shape: tuple[int, int, int], classes: int = 0, device: str | torch.device = "cpu"
) -> ImageCritic:
    """The critic of a recipe's section for images [C, H, W] of so many classes (0: no labels), on the device.

    Of the meta device no weights are looked for. UserError: a key of another kind of critic, a bad value; weights that
    are nowhere to be had.
    """
    section.check()
    if section.kind == "style":
        if section.pretrained is not None:
            critic = pretrained_critic(section.pretrained, shape, device)
        else:
            own = {"img_resolution": shape[-1], "img_channels": shape[0], "time": "none", "label_dim": classes}
            critic = build_critic({"arch": "style_critic", **own, **section.style})  # type: ignore[assignment]
        return StyleJudge(critic, section.diffaug).to(device)
    if section.kind == "projected":
        named = bool(classes) and section.embedding == "imagenet_lite0"
        return ProjectedCritic(
            section.backbones,
            classes,
            section.embedding,
            section.weights,
            section.bn_probe,
            size=section.size,
            width=section.width,
            pool=None if section.pool == "batch" else section.pool,
            diffaug=section.diffaug,
            seed=section.seed,
            table=class_table(section.file(CLASSES), device) if named else None,
            device=device,
        )
    kind, trunk = VGG16Critic if section.kind == "vgg16" else LpipsCritic, section.trunk
    file = section.file(trunk)
    found = (
        load_backbone(trunk, device, file, section.size) if trunk in BACKBONES else load_features(trunk, device, file)
    )
    return kind(found, shape, section.freeze_trunk, section.diffaug).to(device)


def class_table(path: Path | None, device: str | torch.device) -> Tensor:
    """The mean of lite0's last map over the images of each of ImageNet's classes, [1000, 320], from the file `path` or
    StyleGAN-XL's. UserError: none to be had, or a file of something else."""
    if torch.device(device).type == "meta":
        want(CLASSES, path)
        return torch.empty(ROWS, TABLE, device="meta")
    path = find_weights(CLASSES, path)
    tables = [tensor for tensor in read_tensors(path).values() if tuple(tensor.shape) == (ROWS, TABLE)]
    if len(tables) != 1:
        raise UserError(f"{path} holds no table of ImageNet's classes, {ROWS} x {TABLE}")
    return tables[0].float()
