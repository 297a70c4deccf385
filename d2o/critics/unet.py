"""Diffusion2GAN's critic: the teacher's pretrained U-Net, which judges what it was trained to denoise (Kang et al.
2024, section 3.3, Fig. 7).

It is told the noise z that a sample came from by a convolution that begins at zero, sees the sample at every scale of
its encoder, and says at every place of every scale of its decoder how real that is. As training begins its features
are the teacher's, exactly.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.condition import Embedded
from d2o.critics.unet_levels import DecoderStates, Reading, backbone_of
from d2o.errors import UserError, unknown
from d2o.networks.build import build_network, network_config, set_dropout
from d2o.networks.config import Config

if TYPE_CHECKING:
    from typing_extensions import Unpack

Z = ("after_conv_in", "before_conv_in", "none")
INPUTS = ("3x3", "1x1", "none")
RESIZES = ("area", "bicubic")
HEADS = ("multi", "final", "final_mean")
PER = ("scale", "resnet")
COMBINED = ("output", "concat")
FORMS = {"1x1": 1, "3x3": 3}


class UNetCriticOptions(TypedDict, total=False):
    """Those of a `UNetCritic`, which says what they are."""

    z: str
    inputs: str
    resize: str
    inputs_zero: bool
    inputs_with_z: bool
    heads: str
    per: str
    combined: str
    head: str
    head_norm: bool
    keep_output: bool
    t: float | None


PER_RESNET_3X3: UNetCriticOptions = {"per": "resnet", "head": "3x3", "inputs": "1x1"}
"""Options that give SDXL's critic the printed size, 2567.7M parameters, which the usual ones do not."""


class UNetCritic(nn.Module):
    """critic(x [B, C, H, W], z [B, C, H, W], condition, t=None) -> logits, a list of maps [B, h, w] float32, high for
    real.

    `network`: the configuration of the U-Net (`arch` edm_view of a UNet2DConditionModel, or one of EDM's); `module`:
    the network itself, if there is one already (`of` copies a teacher's). The paper leaves open nearly all of this:

    `z`: a 3x3 convolution of z, 0 at first, is added after the input convolution (the same function as widening that by
    the channels of z with zero weights) or before it (C -> C channels), or z is not looked at.
    `inputs`: a convolution of that size of x, resized to each further level of the encoder, is added to what enters the
    level (not to the skip that left there before); "none": x enters at the top alone. `resize`: "area" or "bicubic",
    both without aliasing. `inputs_zero`: they begin at 0. `inputs_with_z`: they are given z beside x, resized alike
    (averaging takes from its variance).
    `heads`: "multi": logits of three tensors of each scale of the decoder; "final": one map, of what enters the output
    convolution, by a new 3x3 convolution; "final_mean": the mean over the channels of the network's output.
    `per`: the three are the scale's first skip, what comes from below, and what the scale gives before it is upsampled;
    or for each residual block ("resnet") its own. `combined`: the third tensor is the "output", or the other two side
    by side ("concat": nothing then comes of the last scale's blocks). `head`: size of the heads' convolutions;
    `head_norm`: group normalisation and SiLU before them.
    `keep_output`: the output convolution stays, though with new heads nothing comes of it.
    `t`: what the network is told of x's noise where a call does not say it: a step 0..999, or (EDM) a noise level;
    None: that of clean data. UserError: unknown options, or ones that do not go together, another kind of network.
    """

    def __init__(
        self,
        network: Config,
        z: str = "after_conv_in",
        inputs: str = "3x3",
        resize: str = "area",
        inputs_zero: bool = True,
        inputs_with_z: bool = False,
        heads: str = "multi",
        per: str = "scale",
        combined: str = "output",
        head: str = "1x1",
        head_norm: bool = False,
        keep_output: bool = True,
        t: float | None = None,
        module: nn.Module | None = None,
    ):
        super().__init__()
        given = {"z": (z, Z), "inputs": (inputs, INPUTS), "resize": (resize, RESIZES), "heads": (heads, HEADS)}
        given |= {"per": (per, PER), "combined": (combined, COMBINED), "head": (head, tuple(FORMS))}
        for key, (value, known) in given.items():
            if value not in known:
                raise unknown(f"critic.{key}", value, known)
        if heads == "final_mean" and not keep_output:
            raise UserError("critic.keep_output: heads final_mean reads the output convolution", "keep_output: true")
        if inputs_with_z and z == "none":
            raise UserError("critic.inputs_with_z: z: none says that the critic does not look at z")
        self.network = build_network(network) if module is None else module
        options = {"z": z, "inputs": inputs, "resize": resize, "inputs_zero": inputs_zero, "heads": heads, "per": per}
        options |= {"inputs_with_z": inputs_with_z, "combined": combined, "head": head, "head_norm": head_norm}
        self.config = {"arch": "unet_critic", "network": network, **options, "keep_output": keep_output, "t": t}
        self.z, self.resize, self.inputs_with_z = z, resize, inputs_with_z
        self.heads_kind, self.per, self.combined, self.t = heads, per, combined, t

        backbone = backbone_of(self.network)
        first = backbone.first
        assert isinstance(first.in_channels, int) and isinstance(first.out_channels, int)
        channels = first.in_channels
        self.conv_z = None
        if z != "none":
            self.conv_z = zero(
                nn.Conv2d(channels, first.out_channels if z == "after_conv_in" else channels, 3, padding=1)
            )
        self.inputs = nn.ModuleList()
        for width in backbone.entering if inputs != "none" else []:
            layer = convolution(channels * (2 if inputs_with_z else 1), width, FORMS[inputs])
            self.inputs.append(zero(layer) if inputs_zero else layer)
        self.heads = nn.ModuleList()
        if heads == "multi":
            for widths in self._read(backbone.scales):
                self.heads.append(nn.ModuleList(make_head(width, FORMS[head], head_norm) for width in widths))
        elif heads == "final":
            self.heads.append(nn.ModuleList([make_head(backbone.last, 3, head_norm)]))
        if not keep_output:
            backbone.drop_output()

    @classmethod
    def of(cls, network: nn.Module, **options: Unpack[UNetCriticOptions]) -> UNetCritic:
        """A critic that begins from a copy of this network, a teacher's or student's, all of it to be trained, without
        dropout."""
        own = copy.deepcopy(network)
        set_dropout(own, 0.0)
        critic = cls(network_config(own), **options, module=own).to(next(own.parameters()).device)
        return critic.requires_grad_(True).train()

    def forward(
        self, x: Tensor, z: Tensor, condition: Embedded = None, t: Tensor | float | None = None
    ) -> list[Tensor]:
        found = self.features(x, z, condition, t)
        if self.heads_kind == "final_mean":
            assert found.output is not None
            return [wide(found.output.mean(1))]
        read = self._read(found.scales) if self.heads_kind == "multi" else [[found.last]]
        return [
            wide(head(tensor))[:, 0]
            for heads, tensors in zip(self.heads, read, strict=True)
            for head, tensor in zip(heads, tensors, strict=True)  # type: ignore[call-overload]
        ]

    def features(
        self, x: Tensor, z: Tensor, condition: Embedded = None, t: Tensor | float | None = None
    ) -> DecoderStates:
        """What the U-Net finds in x; arguments as those of the critic."""
        x, z = wide(x), wide(z)
        backbone = backbone_of(self.network)
        t = (backbone.clean if self.t is None else self.t) if t is None else t
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        more = None if self.conv_z is None else self.conv_z(z)
        seen = torch.cat([x, z], 1) if self.inputs_with_z else x

        def enter(level: int, hidden: Tensor) -> Tensor:
            if not len(self.inputs):
                return hidden
            return hidden + self.inputs[level - 1](resized_to(seen, hidden.shape[2:], self.resize))

        if more is None or self.z == "before_conv_in":
            return backbone.run(x if more is None else x + more, times, condition, enter)
        hook = backbone.first.register_forward_hook(lambda module, args, out: out + more)
        try:
            return backbone.run(x, times, condition, enter)
        finally:
            hook.remove()

    def _read(self, scales: list[list[Reading]]) -> list[list[Any]]:
        """What the heads look at, by scale: tensors, or their numbers of channels."""
        return [
            [value for row in (rows if self.per == "resnet" else [first_to_last(rows)]) for value in self._three(row)]
            for rows in scales
        ]

    def _three(self, row: Reading) -> list[Any]:
        if self.combined == "output":
            return list(row)
        both = row.skip + row.up if isinstance(row.skip, int) else torch.cat([row.up, row.skip], 1)
        return [row.skip, row.up, both]


def first_to_last(rows: list[Reading]) -> Reading:
    """A scale as one block: its first skip, what comes from below, what it gives."""
    return Reading(rows[0].skip, rows[0].up, rows[-1].out)


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all weights 0."""
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def make_head(channels: int, kernel: int, norm: bool) -> nn.Module:
    """[B, channels, h, w] -> [B, 1, h, w]."""
    layer = convolution(channels, 1, kernel)
    return nn.Sequential(nn.GroupNorm(math.gcd(32, channels), channels), nn.SiLU(), layer) if norm else layer


def resized_to(x: Tensor, size: torch.Size, kind: str) -> Tensor:
    """x [B, C, H, W] at another size (h, w), without aliasing."""
    if kind == "area":
        return F.interpolate(x, size=size, mode="area")
    return F.interpolate(x, size=size, mode="bicubic", antialias=True)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
