"""The U-Nets of EDM: SongUNet (DDPM++ and NCSN++), DhariwalUNet (ADM), and their denoiser.

Sources: Song et al. 2021 (DDPM++, NCSN++), Dhariwal & Nichol 2021 (ADM), Karras et al. 2022, Table 1 and appendix F.
Parameter names are those of the published EDM checkpoints, so their state dicts load with no renaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.networks.config import Config
from d2o.networks.edm_blocks import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    run_block,
)
from d2o.networks.precond import Denoiser, Returned, check_part, map_of

SQRT_HALF = math.sqrt(0.5)
Enter = Callable[[str, Tensor, "Tensor | None"], Tensor]
"""(name of a part of a U-Net: enc.NAME, dec.NAME, out_NAME; the tensor that enters it; the skip that joins it there, if
any) -> what enters in its place. Outside of what checkpointing recomputes, unlike a hook of the part."""


def as_it_is(name: str, x: Tensor, skip: Tensor | None) -> Tensor:
    return x


class SongUNet(nn.Module):
    """DDPM++ (`embedding="positional"`, `encoder="standard"`, fir (1, 1)) and NCSN++ (`"fourier"`, `"residual"`, fir
    (1, 3, 3, 1)).

    forward(x [B, C, R, R], c_noise [B], labels one-hot [B, label_dim] or None, augment [B, augment_dim] or None) -> [B,
    out_channels, R, R]; with `part` "encoder" the features [B, c, h, w] that `disc_map` names, with "encoder_decoder"
    both. `enter`: see `Enter`. `fourier_scale`: standard deviation of the Fourier embedding's frequencies (improved
    consistency training: 0.02).
    """

    disc_map = "enc_last_mean"
    checkpointing = False

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        emb_mult: int = 4,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.10,
        embedding: str = "positional",
        noise_mult: int = 1,
        fourier_scale: float = 16.0,
        encoder: str = "standard",
        fir: tuple[int, ...] = (1, 1),
    ):
        super().__init__()
        emb = model_channels * emb_mult
        noise = model_channels * noise_mult
        init: Init = {"mode": "xavier"}
        zero: Init = {"mode": "xavier", "gain": 1e-5}
        block = partial(
            UNetBlock,
            emb_channels=emb,
            dropout=dropout,
            skip_scale=SQRT_HALF,
            eps=1e-6,
            fir=tuple(fir),
            resample_proj=True,
            scale_shift=False,
            init=init,
            init_zero=zero,
            init_attn={"mode": "xavier", "gain": math.sqrt(0.2)},
        )
        self.label_dim = label_dim
        self.map_noise = (
            PositionalEmbedding(noise, endpoint=True)
            if embedding == "positional"
            else FourierEmbedding(noise, fourier_scale)
        )
        self.map_label = Linear(label_dim, noise, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise, emb, **init)
        self.map_layer1 = Linear(emb, emb, **init)

        self.enc = nn.ModuleDict()
        channels, aux = in_channels, in_channels
        skips: list[int] = []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, model_channels, 3, **init)
                channels = model_channels
                skips.append(channels)
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, down=True)
                if encoder == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(
                        aux, channels, 3, down=True, fir=tuple(fir), fused=True, **init
                    )
                    aux = channels
                skips.append(channels)
            for i in range(num_blocks):
                out = model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = block(channels, out, heads=int(res in attn_resolutions))
                channels = out
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, heads=1)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, up=True)
            for i in range(num_blocks + 1):
                out = model_channels * mult
                heads = int(i == num_blocks and res in attn_resolutions)
                self.dec[f"{res}x{res}_block{i}"] = block(channels + skips.pop(), out, heads=heads)
                channels = out
        res = img_resolution
        self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(channels, 1e-6)
        self.dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, out_channels, 3, **zero)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
        part: str = "decoder",
        enter: Enter = as_it_is,
    ) -> Returned:
        emb = self.map_noise(c_noise)
        emb = emb.reshape(len(emb), 2, -1).flip(1).reshape(emb.shape)  # (cos, sin) -> (sin, cos)
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips: list[Tensor] = []
        aux = x
        for name, module in self.enc.items():
            if "aux" in name:
                x = skips[-1] = aux = (x + module(aux)) * SQRT_HALF
            else:
                x = enter(f"enc.{name}", x, None)
                x = run_block(module, x, emb, self.checkpointing) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)
        features = x
        if part == "encoder" and self.disc_map != "mid_mean":
            return features
        for name, module in self.dec.items():
            skip = skips.pop() if getattr(module, "in_channels", x.shape[1]) != x.shape[1] else None
            x = enter(f"dec.{name}", x, skip)
            if name.endswith("aux_norm"):
                x = F.silu(module(x))
            elif name.endswith("aux_conv"):
                x = module(x)
            else:
                if skip is not None:
                    x = torch.cat([x, skip], dim=1)
                x = run_block(module, x, emb, self.checkpointing)
                if self.disc_map == "mid_mean" and name.endswith("_in1"):
                    features = x
                    if part == "encoder":
                        return features
        return (x, features) if part == "encoder_decoder" else x


class DhariwalUNet(nn.Module):
    """The ADM U-Net. forward as `SongUNet`; attention has 64 channels per head, embeddings scale and shift the second
    norm."""

    disc_map = "enc_last_mean"
    checkpointing = False

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        emb_mult: int = 4,
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (32, 16, 8),
        dropout: float = 0.10,
    ):
        super().__init__()
        emb = model_channels * emb_mult
        init: Init = {"mode": "kaiming", "gain": math.sqrt(1 / 3), "bias_gain": math.sqrt(1 / 3)}
        zero: Init = {"mode": "kaiming", "gain": 0.0, "bias_gain": 0.0}
        block = partial(UNetBlock, emb_channels=emb, dropout=dropout, init=init, init_zero=zero)

        def heads(res: int, channels: int) -> int:
            return channels // 64 if res in attn_resolutions else 0

        self.label_dim = label_dim
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb, **init)
        self.map_layer1 = Linear(emb, emb, **init)
        self.map_label = Linear(label_dim, emb, bias=False, mode="kaiming") if label_dim else None
        if self.map_label is not None:  # the one normal draw: kaiming_normal times sqrt(label_dim) has unit variance
            nn.init.normal_(self.map_label.weight)

        self.enc = nn.ModuleDict()
        channels, skips = in_channels, []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, model_channels * mult, 3, **init)
                channels = model_channels * mult
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, down=True)
            skips.append(channels)
            for i in range(num_blocks):
                out = model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = block(channels, out, heads=heads(res, out))
                channels = out
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, heads=channels // 64)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, up=True)
            for i in range(num_blocks + 1):
                out = model_channels * mult
                self.dec[f"{res}x{res}_block{i}"] = block(channels + skips.pop(), out, heads=heads(res, out))
                channels = out
        self.out_norm = GroupNorm(channels, 1e-5)
        self.out_conv = Conv2d(channels, out_channels, 3, **zero)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
        part: str = "decoder",
        enter: Enter = as_it_is,
    ) -> Returned:
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels)
        emb = F.silu(emb)
        skips = []
        for name, module in self.enc.items():
            x = enter(f"enc.{name}", x, None)
            x = run_block(module, x, emb, self.checkpointing) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        features = x
        if part == "encoder" and self.disc_map != "mid_mean":
            return features
        for name, module in self.dec.items():
            skip = skips.pop() if x.shape[1] != module.in_channels else None
            x = enter(f"dec.{name}", x, skip)
            if skip is not None:
                x = torch.cat([x, skip], dim=1)
            x = run_block(module, x, emb, self.checkpointing)
            if self.disc_map == "mid_mean" and name.endswith("_in1"):
                features = x
                if part == "encoder":
                    return features
        x = F.silu(self.out_norm(enter("out_norm", x, None)))
        x = self.out_conv(enter("out_conv", x, None))
        return (x, features) if part == "encoder_decoder" else x


ARCHITECTURES = {"ddpmpp": SongUNet, "ncsnpp": SongUNet, "adm": DhariwalUNet}
NCSNPP = {"embedding": "fourier", "noise_mult": 2, "encoder": "residual", "fir": (1, 3, 3, 1)}


class EDMPrecond(Denoiser):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise, labels), the denoiser of Karras et al. 2022, eq. 7 and Table 1.

    `arch` is "ddpmpp", "ncsnpp" or "adm"; `precond`, `sigma_min` and `sigma_max` as in `Denoiser`; further arguments go
    to the U-Net. forward(x [B, C, R, R], sigma [B] or scalar, label: class indices [B] int64, one-hot [B, label_dim],
    or None) -> denoised x [B, C, R, R], float32. `label_dim` 0: `label` must be None. Labels of -1 (or None) give the
    unconditional denoiser: an all-zero one-hot row. iDDPM's U-Net has 2C output channels, of which the first C (the
    mean) are used.

    `augment_labels` [B, augment_dim]: how x was augmented; None, as all zeros, for not at all. `part` as in `Denoiser`.
    """

    def __init__(
        self,
        arch: str,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        sigma_data: float = 0.5,
        precond: str = "edm",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        **unet: Any,  # noqa: ANN401 (arguments of the U-Net, as a configuration has them)
    ):
        super().__init__(img_resolution, img_channels, label_dim, sigma_data, precond, sigma_min, sigma_max)
        options = {"precond": precond if precond != "edm" else None, "sigma_min": sigma_min, "sigma_max": sigma_max}
        self.config: Config = {
            "arch": arch,
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "label_dim": label_dim,
            "sigma_data": sigma_data,
            **{key: value for key, value in options.items() if value is not None},
            **unet,
        }
        if arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
        if arch == "ncsnpp":
            unet = {**NCSNPP, **unet}
        outputs = img_channels * (2 if precond == "iddpm" else 1)
        self.model = ARCHITECTURES[arch](img_resolution, img_channels, outputs, label_dim=label_dim, **unet)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        label: Tensor | None = None,
        augment_labels: Tensor | None = None,
        part: str = "decoder",
    ) -> Returned:
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        inputs = (c_in * x, c_noise.reshape(-1).expand(len(x)), self.one_hot(label, len(x)), augment_labels)
        features = None
        if part == "decoder":
            f = self.model(*inputs)
        else:
            check_part(part)
            found = self.model(*inputs, part=part)
            if part == "encoder":
                return map_of(found, self.model.disc_map)
            f, features = found
        denoised = torch.addcmul(c_skip * x, c_out, f[:, : self.img_channels].to(torch.float32))
        return denoised if features is None else (denoised, map_of(features, self.model.disc_map))


def remove_augment(network: nn.Module) -> None:
    """Take the input of augmentation labels off a denoiser of EDM, in place: a student is never told any; other
    networks have none."""
    if isinstance(network, EDMPrecond):
        network.model.map_augment = None
        network.config.pop("augment_dim", None)
