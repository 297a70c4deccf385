"""The generator of denoising diffusion GANs: an NCSN++ that takes a latent z through its group norms and predicts the
clean image.

Xiao et al. 2022, section 4 and appendix C; sizes of the authors' commands: CIFAR-10 nf 128, channel_mult (1, 2, 2, 2),
n_mlp 4; at 256 px nf 64, channel_mult (1, 1, 2, 2, 4, 4), n_mlp 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2o.networks.config import Config
from d2o.networks.edm_blocks import Conv2d, GroupNorm, Linear
from d2o.networks.ncsnpp_blocks import (
    FIR,
    SQRT_HALF,
    ZERO,
    Attention,
    LabelEmbedding,
    ResidualBlock,
    TimeEmbedding,
    dense,
)


class LatentMapping(nn.Module):
    """z [B, nz] standard normal -> its embedding [B, zdim]: normalised, then n_mlp + 1 dense layers with SiLU."""

    def __init__(self, nz: int, zdim: int, n_mlp: int):
        super().__init__()
        self.layers = nn.ModuleList(dense(nz if i == 0 else zdim, zdim) for i in range(n_mlp + 1))

    def forward(self, z: Tensor) -> Tensor:
        z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            z = F.silu(layer(z))
        return z


class DDGANGenerator(nn.Module):
    """forward(x_{t+1} [B, C, R, R], t [B] int64 of 0 .. K - 1, z [B, nz] standard normal, labels [B] or None) -> x_0
    [B, C, R, R] in [-1, 1].

    `channel_mult` has one entry per resolution R, R / 2, ...; R must be divisible by 2^(entries - 1), nf by 4.
    `classes` > 0 (ours: the paper's networks are unconditional) adds an embedding of the label to that of t.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        nf: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        nz: int = 100,
        zdim: int = 256,
        n_mlp: int = 4,
        classes: int = 0,
    ):
        super().__init__()
        self.config: Config = {
            "arch": "ddgan",
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "nf": nf,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": list(attn_resolutions),
            "nz": nz,
            "zdim": zdim,
            "n_mlp": n_mlp,
            "classes": classes,
        }
        levels = len(channel_mult)
        if img_resolution % 2 ** (levels - 1):
            raise ValueError(f"{img_resolution} pixels cannot be halved {levels - 1} times")
        if nf % 4:
            raise ValueError(f"nf must be a multiple of 4, not {nf}")
        self.img_resolution, self.img_channels, self.nz, self.classes = img_resolution, img_channels, nz, classes
        emb = 4 * nf
        self.time = TimeEmbedding(nf)
        self.time0, self.time1 = Linear(nf, emb), Linear(emb, emb)
        self.label = LabelEmbedding(classes, emb) if classes else None
        self.mapping = LatentMapping(nz, zdim, n_mlp)

        def block(inputs: int, outputs: int, **resample: bool) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, emb, zdim, **resample)

        self.enc = nn.ModuleDict({"conv": Conv2d(img_channels, nf, 3)})
        channels, pyramid, skips = nf, img_channels, [nf]
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level:
                self.enc[f"{res}_down"] = block(channels, channels, down=True)
                self.enc[f"{res}_pyramid"] = Conv2d(pyramid, channels, 3, down=True, fir=FIR, fused=True)
                pyramid = channels
                skips.append(channels)
            for i in range(num_res_blocks):
                self.enc[f"{res}_block{i}"] = block(channels, nf * mult)
                channels = nf * mult
                if res in attn_resolutions:
                    self.enc[f"{res}_attention{i}"] = Attention(channels)
                skips.append(channels)

        self.dec = nn.ModuleDict(
            {"in0": block(channels, channels), "in_attention": Attention(channels), "in1": block(channels, channels)}
        )
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            for i in range(num_res_blocks + 1):
                self.dec[f"{res}_block{i}"] = block(channels + skips.pop(), nf * mult)
                channels = nf * mult
            if res in attn_resolutions:
                self.dec[f"{res}_attention"] = Attention(channels)
            if level:
                self.dec[f"{res}_up"] = block(channels, channels, up=True)
        self.out_norm = GroupNorm(channels, 1e-6)
        self.out_conv = Conv2d(channels, img_channels, 3, **ZERO)

    def forward(self, x: Tensor, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        temb = self.time1(F.silu(self.time0(self.time(t).to(x.dtype))))
        if self.label is not None:
            assert labels is not None
            temb = temb + self.label(labels)
        temb, z = F.silu(temb), self.mapping(z)

        pyramid = x
        skips: list[Tensor] = []
        for name, module in self.enc.items():
            if isinstance(module, ResidualBlock):
                x = module(x, temb, z)
            elif name.endswith("pyramid"):
                pyramid = module(pyramid)
                x = pyramid = (pyramid + x) * SQRT_HALF
            else:
                x = module(x)
            if "attention" in name or "pyramid" in name:
                skips[-1] = x  # in place of what the block before it gave
            else:
                skips.append(x)
        for module in self.dec.values():
            if isinstance(module, ResidualBlock):
                if x.shape[1] != module.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, temb, z)
            else:
                x = module(x)
        return torch.tanh(self.out_conv(F.silu(self.out_norm(x))))
