"""From a plain configuration to a critic."""

from __future__ import annotations

from torch import nn

from d2o.critics.dd_gan import DDGANCritic
from d2o.critics.style import StyleCritic
from d2o.critics.unet import UNetCritic
from d2o.networks.build import build_network
from d2o.networks.config import Config

CRITICS: dict[str, type[nn.Module]] = {
    "ddgan_critic": DDGANCritic,
    "style_critic": StyleCritic,
    "unet_critic": UNetCritic,
}
"""arch -> class."""


def build_critic(config: Config) -> nn.Module:
    """`config` holds `arch` (one of `CRITICS`) and that critic's arguments. UserError: an unknown one, a bad value."""
    return build_network(config, plain=CRITICS)
