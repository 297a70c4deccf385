"""A denoiser that is also told where to go: f(x_t, t, s), for consistency trajectory models (Kim et al. 2024).

The U-Nets of EDM add a linear map of their augmentation labels to the noise embedding of t, ahead of two further
layers. Those labels are put to
another use here: they are an embedding of s. With the new map at 0 the network starts as the one that it is made of.
"""

from __future__ import annotations

from torch import Tensor, nn

from d2o.networks.build import build_network, network_config
from d2o.networks.config import Config
from d2o.networks.edm_blocks import PositionalEmbedding

CHANNELS = 128
_embedding = PositionalEmbedding(CHANNELS, endpoint=True)


def second_time(s: Tensor) -> Tensor:
    """Noise levels s [B] > 0 -> [B, 128] float32: sines and cosines of ln(s) / 4, as DDPM++ is told t in EDM's
    preconditioning."""
    return _embedding(s.log().float() / 4)


def second_time_config(config: Config) -> Config:
    """The network configuration with an input for s."""
    return {**config, "augment_dim": CHANNELS}


def with_second_time(network: nn.Module) -> nn.Module:
    """A copy of a denoiser of EDM's families that takes `second_time(s)` as its fourth argument, and does not mind it
    yet."""
    config = network_config(network)
    weights = {name: value for name, value in network.state_dict().items() if "map_augment" not in name}
    grown = build_network(second_time_config(config))
    device = next(network.parameters()).device
    grown.load_state_dict(
        {**weights, **{name: value for name, value in grown.state_dict().items() if name not in weights}}
    )
    for name, p in grown.named_parameters():
        if "map_augment" in name:
            nn.init.zeros_(p)
    return grown.to(device)
