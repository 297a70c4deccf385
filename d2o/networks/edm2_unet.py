"""EDM2's magnitude-preserving U-Net and its denoiser with the uncertainty head.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", configuration G
(section 2.3, appendix B). Parameter names are those of the published checkpoints, so their state dicts load with no
renaming.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2o.errors import UserError, unknown
from d2o.networks.config import Config
from d2o.networks.copying import local
from d2o.networks.edm2_blocks import Block, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize
from d2o.networks.edm_blocks import run_block
from d2o.networks.precond import Denoiser, Returned, check_part, map_of

EDM2_SIZES: dict[str, Config] = {
    "xxs": {"model_channels": 64, "dropout": 0.0},
    "xs": {"model_channels": 128, "dropout": 0.0},
    "s": {"model_channels": 192, "dropout": 0.0},
    "m": {"model_channels": 256, "dropout": 0.1},
    "l": {"model_channels": 320, "dropout": 0.1},
    "xl": {"model_channels": 384, "dropout": 0.1},
    "xxl": {"model_channels": 448, "dropout": 0.1},
}
"""The published sizes (`preset`): width, and the dropout they were trained with."""
FORCE_WN = ("post_step", "pre_forward", "off")


class UNet(nn.Module):
    """forward(x [B, C, R, R], c_noise [B], labels one-hot [B, label_dim] or None) -> [B, C, R, R].

    `noise_mult`, `emb_mult`: widths of the noise embedding and of the final one over `model_channels`; by default those
    of the widths at the finest level and of the widest level. Further arguments go to the blocks. With `part` "encoder"
    the features [B, c, h, w] that `disc_map` names are returned, with "encoder_decoder" both.
    """

    disc_map = "enc_last_mean"
    checkpointing = False

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        *,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        noise_mult: int | None = None,
        emb_mult: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ):
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        noise = model_channels * noise_mult if noise_mult is not None else widths[0]
        emb = model_channels * emb_mult if emb_mult is not None else max(widths)
        block = partial(
            Block,
            emb_channels=emb,
            channels_per_head=channels_per_head,
            dropout=dropout,
            res_balance=res_balance,
            attn_balance=attn_balance,
            clip_act=clip_act,
        )
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, emb, 0)
        self.emb_label = MPConv(label_dim, emb, 0) if label_dim else None

        self.enc = nn.ModuleDict()
        channels, skips = widths[0], []
        for level, width in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(img_channels + 1, channels, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, resample="down")
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(channels, width, attention=res in attn_resolutions)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, decoder=True, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels, decoder=True)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, decoder=True, resample="up")
            for i in range(num_blocks + 1):
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = block(
                    channels + skips.pop(), width, decoder=True, attention=attention
                )
                channels = width
        self.out_conv = MPConv(channels, img_channels, 3)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, part: str = "decoder") -> Returned:
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None and labels is not None:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(self.label_dim)), self.label_balance)
        emb = mp_silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # the constant channel stands in for biases
        skips = []
        for module in self.enc.values():
            x = run_block(module, x, emb, self.checkpointing) if isinstance(module, Block) else module(x)
            skips.append(x)
        features = x
        if part == "encoder" and self.disc_map != "mid_mean":
            return features
        for name, module in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = run_block(module, x, emb, self.checkpointing)
            if self.disc_map == "mid_mean" and name.endswith("_in1"):
                features = x
                if part == "encoder":
                    return features
        x = self.out_conv(x, gain=self.out_gain)
        return (x, features) if part == "encoder_decoder" else x


class EDM2Precond(Denoiser):
    """EDM's denoiser around EDM2's U-Net, with the uncertainty u(sigma) of Karras et al. 2024, eq. 21
    (`logvar_channels` 0: without).

    forward(x [B, C, R, R], sigma [B] or scalar, label: class indices [B] int64 (-1: none), one-hot [B, label_dim], or
    None) -> denoised x float32; with `return_logvar` u(sigma) [B, 1, 1, 1] is added at the end. `part` as in
    `Denoiser`; there is no input for `augment_labels`, which other
    denoisers have: they are ignored. Run it under `torch.autocast` for bfloat16 or float16: weights stay float32 and
    are normalised in float32, embeddings and the uncertainty are computed in float32.

    `force_wn`: forced weight normalisation in training (section 2.3). "post_step": whoever takes the optimiser's step
    calls `normalize_weights()` after it; "pre_forward": every forward in training mode does so first; "off": never. The
    function that the network computes does not depend on it, the effective learning rate does.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        force_wn: str = "post_step",
        **unet: Any,  # noqa: ANN401 (arguments of `UNet`, as a configuration has them)
    ):
        super().__init__(img_resolution, img_channels, label_dim, sigma_data)
        if force_wn not in FORCE_WN:
            raise unknown("network.force_wn", force_wn, FORCE_WN)
        self.config: Config = {
            "arch": "edm2",
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
            "sigma_data": sigma_data,
            "logvar_channels": logvar_channels,
            "force_wn": force_wn,
            **unet,
        }
        self.force_wn, self.normalised_before = force_wn, False
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet)
        self.logvar_fourier = MPFourier(logvar_channels) if logvar_channels else None
        self.logvar_linear = MPConv(logvar_channels, 1, 0) if logvar_channels else None

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None = None,
        augment_labels: Tensor | None = None,
        part: str = "decoder",
        return_logvar: bool = False,
    ) -> Returned:
        check_part(part)
        if not self.normalised_before:
            self.before_forward()
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        c_noise = c_noise.reshape(-1).expand(len(x))
        found = self.unet(c_in * x, c_noise, self.one_hot(label, len(x)), part)
        results = []
        if part != "encoder":
            f = found if part == "decoder" else found[0]
            results.append(torch.addcmul(c_skip * x, c_out, f.to(torch.float32)))
        if part != "decoder":
            results.append(map_of(found if part == "encoder" else found[1], self.unet.disc_map))
        if return_logvar:
            results.append(self._logvar(c_noise))
        return results[0] if len(results) == 1 else tuple(results)

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma) [B, 1, 1, 1] for noise levels [B]. UserError without the head."""
        return self._logvar(sigma.to(torch.float32).reshape(-1).log() / 4)

    def _logvar(self, c_noise: Tensor) -> Tensor:
        if self.logvar_fourier is None or self.logvar_linear is None:
            raise UserError(
                "this EDM2 network has no uncertainty head",
                "set network.logvar_channels (the published networks have 128)",
            )
        return self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)

    def before_forward(self) -> None:
        """What every forward begins with; `training.strategy` does it while the weights are still sharded, as changes
        of gathered ones are lost, and sets `normalised_before`."""
        if self.training and self.force_wn == "pre_forward":
            self.normalize_weights()

    @torch.no_grad()
    def normalize_weights(self) -> None:
        """Give every weight unit root mean square per output channel, in place (eq. 66). The network computes the same
        as before, since its layers normalise their weights anyway (up to the 1e-4 that guards the division)."""
        for module in self.modules():
            if isinstance(module, MPConv) and not module.weight.is_meta:  # a plan's have no numbers
                # Through `.data`: a second forward pass before the first one's backward must not invalidate what
                # autograd has kept. Of a sharded weight each process normalises its own output channels.
                weight = local(module.weight.data)
                weight.copy_(normalize(weight.to(torch.float32), dim=tuple(range(1, weight.ndim))))


def remove_uncertainty(network: nn.Module) -> None:
    """Take the uncertainty head off an EDM2 denoiser, in place; other networks have none."""
    if isinstance(network, EDM2Precond):
        network.logvar_fourier = network.logvar_linear = None
        network.config["logvar_channels"] = 0


def force_normalised(network: nn.Module, force_wn: str | None) -> None:
    """Set how an EDM2 denoiser's weights are kept normalised (None: as it says itself) and, unless that is "off",
    normalise them now; nothing for other networks."""
    if isinstance(network, EDM2Precond):
        network.force_wn = network.config["force_wn"] = force_wn or network.force_wn
        if network.force_wn != "off":
            network.normalize_weights()


def keep_normalised(network: nn.Module) -> None:
    """EDM2's forced weight normalisation after an optimiser's step (Karras et al. 2024, section 2.3); nothing for other
    networks. A network whose `force_wn` is "pre_forward" does it itself before the next pass in training mode, and here
    in evaluation mode."""
    if isinstance(network, EDM2Precond) and (
        network.force_wn == "post_step" or (network.force_wn == "pre_forward" and not network.training)
    ):
        network.normalize_weights()
