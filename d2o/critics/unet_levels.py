"""Denoising U-Nets seen as encoders and decoders: what enters each level on the way down, and what a critic can read on
the way up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from d2o.condition import Embedded
from d2o.errors import UserError
from d2o.networks.edm_unet import DhariwalUNet, EDMPrecond, SongUNet
from d2o.networks.edm_view import EDMView

T = TypeVar("T")
LOWEST_SIGMA = 0.002
"""The noise level that EDM networks take for clean images (Karras et al. 2022, Table 1)."""

EnterLevel = Callable[[int, Tensor], Tensor]
"""(level of the encoder, from 1; what enters it [B, C, h, w]) -> what enters in its place."""


class Reading(NamedTuple):
    """Of one residual block of a decoder: the skip that it takes, what comes from below, and what it gives, attention
    included. Tensors [B, C, h, w], or their numbers of channels."""

    skip: Any
    up: Any
    out: Any


@dataclass
class DecoderStates:
    """What a pass has found: `scales`, the decoder's readings from coarse to fine, of each scale those of its residual
    blocks before any upsampling; `last`, what enters the output convolution; `output`, what comes out of it."""

    scales: list[list[Reading]] = field(default_factory=list)
    last: Tensor | None = None
    output: Tensor | None = None


class LevelledUNet(ABC):
    """A network and its numbers of channels: `entering` of each level of the encoder but the first, `scales` as in
    `DecoderStates`, `last` of the output convolution. It holds nothing else: one is made whenever it is needed."""

    entering: list[int]
    scales: list[list[Reading]]
    last: int
    clean: float  # the time of clean images

    @property
    @abstractmethod
    def first(self) -> nn.Module:
        """The input convolution."""

    @abstractmethod
    def drop_output(self) -> None:
        """Leave the output convolution away for good."""

    @abstractmethod
    def run(self, x: Tensor, t: Tensor, condition: Embedded, enter: EnterLevel) -> DecoderStates:
        """A pass over x [B, C, H, W] at the times t [B], all that enters a level by way of `enter`."""


class DiffusersBackbone(LevelledUNet):
    """A UNet2DConditionModel inside of an `EDMView`; its times are steps, 0 to 999, and its inputs are x_t itself."""

    clean = 0.0

    def __init__(self, view: EDMView):
        self.view, self.net = view, view.net
        self.entering = [block.resnets[0].in_channels for block in self.net.down_blocks[1:]]
        self.last = self.net.conv_norm_out.num_channels if self.net.conv_norm_out else self.net.conv_out.in_channels
        self.scales = []
        up = self.net.down_blocks[-1].resnets[-1].out_channels
        for block in self.net.up_blocks:
            rows = []
            for resnet in block.resnets:
                rows.append(Reading(resnet.in_channels - up, up, resnet.out_channels))
                up = resnet.out_channels
            self.scales.append(rows)

    @property
    def first(self) -> nn.Module:
        return self.net.conv_in

    def drop_output(self) -> None:
        self.net.conv_out = nn.Identity()

    def run(self, x: Tensor, t: Tensor, condition: Embedded, enter: EnterLevel) -> DecoderStates:
        found = DecoderStates()
        with ExitStack() as stack:
            for level, block in enumerate(self.net.down_blocks):
                if level:
                    stack.callback(_before(block, _replaced(enter, level)))
            for block in self.net.up_blocks:
                skips: list[Tensor] = []
                hidden: list[Tensor] = []  # what enters each residual block from below, then what the last one gives
                stack.callback(_before(block, _entering(hidden, skips)))
                for previous, resnet in zip(block.resnets, block.resnets[1:], strict=False):
                    stack.callback(_before(resnet, _head(hidden, previous.out_channels)))
                if block.upsamplers is not None:
                    stack.callback(_before(block.upsamplers[0], _whole(hidden)))
                stack.callback(block.register_forward_hook(_leaving(found, hidden, skips)).remove)
            last: list[Tensor] = []
            stack.callback(_before(self.net.conv_out, _whole(last)))
            output = self.view.call(x, t, condition)
        found.last, found.output = last[0], output
        return found


# Hooks. Those of residual blocks only look at what enters, which is the same when checkpointing recomputes a block
# without them.


def _before(module: nn.Module, hook: Callable[[tuple, dict[str, Any]], tuple | None]) -> Callable[[], None]:
    """Set a hook of what enters a module; what takes it away again."""
    return module.register_forward_pre_hook(lambda _, args, kwargs: hook(args, kwargs), with_kwargs=True).remove


def _replaced(enter: EnterLevel, level: int) -> Callable[..., tuple]:
    return lambda args, kwargs: (args, {**kwargs, "hidden_states": enter(level, kwargs["hidden_states"])})


def _entering(hidden: list[Tensor], skips: list[Tensor]) -> Callable[..., None]:
    def look(args: tuple, kwargs: dict[str, Any]) -> None:
        hidden.append(kwargs["hidden_states"])
        skips.extend(reversed(kwargs["res_hidden_states_tuple"]))

    return look


def _head(hidden: list[Tensor], channels: int) -> Callable[..., None]:
    return lambda args, kwargs: hidden.append(args[0][:, :channels])


def _whole(hidden: list[Tensor]) -> Callable[..., None]:
    return lambda args, kwargs: hidden.append(args[0])


def _leaving(found: DecoderStates, hidden: list[Tensor], skips: list[Tensor]) -> Callable[..., None]:
    def close(module: nn.Module, args: object, out: Tensor) -> None:
        hidden.extend([out] if len(hidden) == len(skips) else [])
        found.scales.append([Reading(*row) for row in zip(skips, hidden[:-1], hidden[1:], strict=True)])

    return close


class EDMBackbone(LevelledUNet):
    """One of EDM's U-Nets inside of its preconditioning; its times are noise levels, and its inputs images of that
    level: F(c_in x; c_noise). What is read is F's, not the denoiser's."""

    def __init__(self, network: EDMPrecond):
        self.network, self.model = network, cast("SongUNet | DhariwalUNet", network.model)
        self.clean = network.sigma_min or LOWEST_SIGMA
        channels: dict[str, Any] = {f"enc.{name}": part for name, part in self.model.enc.items()}
        self.levels = {name: i for i, name in enumerate(name for name in channels if name.endswith("_block0"))}
        self.entering = [channels[name].in_channels for name in list(self.levels)[1:]]
        self.scales, up = [], 0
        decoder: dict[str, Any] = dict(self.model.dec.items())
        for name, part in decoder.items():
            if name.endswith("_block0"):
                self.scales.append([])
            if "_block" in name:
                self.scales[-1].append(Reading(part.in_channels - up, up, part.out_channels))
            up = getattr(part, "out_channels", up)
        self.last = self.scales[-1][-1].out

    @property
    def first(self) -> nn.Module:
        return next(iter(self.model.enc.values()))

    def drop_output(self) -> None:
        if isinstance(self.model, DhariwalUNet):
            self.model.out_conv = nn.Identity()  # type: ignore[assignment]
        else:
            self.model.dec[next(name for name in self.model.dec if name.endswith("aux_conv"))] = nn.Identity()

    def run(self, x: Tensor, t: Tensor, condition: Embedded, enter: EnterLevel) -> DecoderStates:
        found = DecoderStates()
        rows: list[Reading] = []  # of the scale that the pass is at; `out` is filled in by whoever comes next

        def look(name: str, x: Tensor, skip: Tensor | None) -> Tensor:
            if name.endswith(("aux_conv", "out_conv")):
                found.last = x
            if name.startswith("enc."):
                return enter(self.levels[name], x) if self.levels.get(name) else x
            if rows:
                rows[-1] = rows[-1]._replace(out=x) if rows[-1].out is None else rows[-1]
            if skip is not None:
                rows.append(Reading(skip, x, None))
            elif rows:
                found.scales.append(list(rows))
                rows.clear()
            return x

        sigma = t.to(torch.float32).reshape(-1, 1, 1, 1)
        _, _, c_in, c_noise = self.network.coefficients(sigma)
        assert condition is None or isinstance(condition, Tensor)
        labels = self.network.one_hot(condition, len(x))
        labels = None if labels is None else labels.to(x.dtype)
        time = c_noise.reshape(-1).expand(len(x)).to(x.dtype)
        found.output = self.model(torch.as_tensor(c_in).to(x) * x, time, labels, enter=look)
        return found


def backbone_of(network: nn.Module) -> LevelledUNet:
    """UserError: a network that is no U-Net of these families."""
    if isinstance(network, EDMView) and network.kind == "UNet2DConditionModel":
        return DiffusersBackbone(network)
    if isinstance(network, EDMPrecond):
        return EDMBackbone(network)
    kind = network.kind if isinstance(network, EDMView) else type(network).__name__
    raise UserError(
        f"a critic of the teacher's U-Net takes a UNet2DConditionModel or one of EDM's U-Nets, not a {kind}",
        "Stable Diffusion 1, 2 and XL have the one, ddpmpp, ncsnpp and adm are the other",
    )
