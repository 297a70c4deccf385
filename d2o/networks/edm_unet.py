"""The U-Nets of EDM: SongUNet (DDPM++ and NCSN++), DhariwalUNet (ADM), and the EDM preconditioning.

Sources: Song et al. 2021 (DDPM++, NCSN++), Dhariwal & Nichol 2021 (ADM), Karras et al. 2022, Table 1 and appendix F. Parameter names are
those of the published EDM checkpoints, so their state dicts load with no renaming.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SQRT_HALF = math.sqrt(0.5)


def _uniform_fan(shape: tuple[int, ...], fan_in: int, fan_out: int, mode: str, gain: float) -> Tensor:
    bound = {"xavier": math.sqrt(6 / (fan_in + fan_out)), "kaiming": math.sqrt(3 / fan_in)}[mode]
    return gain * bound * (2 * torch.rand(shape) - 1)


class Linear(nn.Module):
    """x [B, in] -> [B, out]; initialised by `mode` ("xavier" or "kaiming", uniform) times `gain`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, mode: str = "xavier", gain: float = 1.0, bias_gain: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(_uniform_fan((out_features, in_features), in_features, out_features, mode, gain))
        self.bias = nn.Parameter(_uniform_fan((out_features,), in_features, out_features, mode, bias_gain)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """A convolution (kernel 1 or 3), or none (kernel 0), after an optional factor-2 FIR resampling.

    Down: stride-2 depthwise filter f before the convolution; up: transposed stride-2 filter 4f. `fused` swaps the two for down-sampling
    (convolution with the filter's padding first, then the unpadded filter), as NCSN++'s residual input pyramid does.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, up: bool = False, down: bool = False, fir: tuple[int, ...] = (1, 1),
        fused: bool = False, mode: str = "xavier", gain: float = 1.0, bias_gain: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.up, self.down, self.fused = in_channels, out_channels, up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.resample_filter: Tensor
        if kernel:
            fans = (in_channels * kernel**2, out_channels * kernel**2)
            self.weight = nn.Parameter(_uniform_fan((out_channels, in_channels, kernel, kernel), *fans, mode, gain))
            self.bias = nn.Parameter(_uniform_fan((out_channels,), *fans, mode, bias_gain))
        if up or down:
            f = torch.tensor(fir, dtype=torch.float32)
            self.register_buffer("resample_filter", (f.outer(f) / f.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        pad = weight.shape[-1] // 2 if weight is not None else 0
        if not (self.up or self.down):
            assert weight is not None
            return F.conv2d(x, weight, self.bias, padding=pad)
        f = self.resample_filter.to(x.dtype)
        f_pad = (f.shape[-1] - 1) // 2
        if self.fused and self.down:
            assert weight is not None
            x = F.conv2d(x, weight, self.bias, padding=pad + f_pad)
            return F.conv2d(x, f.expand(self.out_channels, 1, -1, -1), groups=self.out_channels, stride=2)
        f = f.expand(self.in_channels, 1, -1, -1)
        if self.up:
            x = F.conv_transpose2d(x, 4 * f, groups=self.in_channels, stride=2, padding=f_pad)
        else:
            x = F.conv2d(x, f, groups=self.in_channels, stride=2, padding=f_pad)
        return x if weight is None else F.conv2d(x, weight, self.bias, padding=pad)


class GroupNorm(nn.GroupNorm):
    def __init__(self, channels: int, eps: float):
        super().__init__(min(32, channels // 4), channels, eps=eps)


class UNetBlock(nn.Module):
    """GN-SiLU-conv, noise embedding, GN-SiLU-conv, skip, optional self-attention. x [B, in, H, W], emb [B, E] -> [B, out, H', W']."""

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, *, up: bool = False, down: bool = False, heads: int = 0,
        dropout: float = 0.0, skip_scale: float = 1.0, eps: float = 1e-5, fir: tuple[int, ...] = (1, 1), resample_proj: bool = False,
        scale_shift: bool = True, init: dict[str, Any] | None = None, init_zero: dict[str, Any] | None = None,
        init_attn: dict[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        init, init_zero = init or {}, init_zero or {}
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.dropout, self.skip_scale, self.scale_shift = dropout, skip_scale, scale_shift
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, fir=fir, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if scale_shift else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, up=up, down=down, fir=fir, **init)
        if heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, **(init_attn if init_attn is not None else init))
            self.proj = Conv2d(out_channels, out_channels, 1, **init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None].to(y.dtype)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            y = F.silu(torch.addcmul(shift, self.norm1(y), scale + 1))
        else:
            y = F.silu(self.norm1(y + e))
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        x = (y + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.heads:
            x = (self.proj(self.attention(self.norm2(x))) + x) * self.skip_scale
        return x

    def attention(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # The 1x1 convolution's channels are ordered head, channel, (q, k, v).
        q, k, v = self.qkv(x).reshape(b, self.heads, c // self.heads, 3, h * w).permute(3, 0, 1, 4, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, h, w)


class PositionalEmbedding(nn.Module):
    """t [B] -> (cos, sin) [B, channels]; frequencies 10000^(-i/h), or -i/(h-1) with `endpoint`."""

    def __init__(self, channels: int, endpoint: bool):
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        freqs = (1 / 10000) ** (i / (half - (1 if self.endpoint else 0)))
        x = t.outer(freqs.to(t.dtype))
        return torch.cat([x.cos(), x.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """t [B] -> (cos, sin)(2 pi f t) [B, channels] with fixed random frequencies (standard deviation `scale`)."""

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.freqs: Tensor
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        x = t.outer((2 * math.pi * self.freqs).to(t.dtype))
        return torch.cat([x.cos(), x.sin()], dim=1)


class SongUNet(nn.Module):
    """DDPM++ (`embedding="positional"`, `encoder="standard"`, fir (1, 1)) and NCSN++ (`"fourier"`, `"residual"`, fir (1, 3, 3, 1)).

    forward(x [B, C, R, R], c_noise [B], labels one-hot [B, label_dim] or None, augment [B, augment_dim] or None) -> [B, out_channels, R, R].
    """

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, *, label_dim: int = 0, augment_dim: int = 0, model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2), emb_mult: int = 4, num_blocks: int = 4, attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.10, embedding: str = "positional", noise_mult: int = 1, encoder: str = "standard", fir: tuple[int, ...] = (1, 1),
    ):  # fmt: skip
        super().__init__()
        emb = model_channels * emb_mult
        noise = model_channels * noise_mult
        init: dict[str, Any] = {"mode": "xavier"}
        zero: dict[str, Any] = {"mode": "xavier", "gain": 1e-5}
        block: dict[str, Any] = {
            "emb_channels": emb, "dropout": dropout, "skip_scale": SQRT_HALF, "eps": 1e-6, "fir": tuple(fir), "resample_proj": True,
            "scale_shift": False, "init": init, "init_zero": zero, "init_attn": {"mode": "xavier", "gain": math.sqrt(0.2)},
        }  # fmt: skip
        self.label_dim = label_dim
        self.map_noise = PositionalEmbedding(noise, endpoint=True) if embedding == "positional" else FourierEmbedding(noise)
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
                self.enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, down=True, **block)
                if encoder == "residual":
                    self.enc[f"{res}x{res}_aux_residual"] = Conv2d(aux, channels, 3, down=True, fir=tuple(fir), fused=True, **init)
                    aux = channels
                skips.append(channels)
            for i in range(num_blocks):
                out = model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(channels, out, heads=int(res in attn_resolutions), **block)
                channels = out
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, heads=1, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                out = model_channels * mult
                heads = int(i == num_blocks and res in attn_resolutions)
                self.dec[f"{res}x{res}_block{i}"] = UNetBlock(channels + skips.pop(), out, heads=heads, **block)
                channels = out
        res = img_resolution
        self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(channels, 1e-6)
        self.dec[f"{res}x{res}_aux_conv"] = Conv2d(channels, out_channels, 3, **zero)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
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
                x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)
        for name, module in self.dec.items():
            if name.endswith("aux_norm"):
                x = F.silu(module(x))
            elif name.endswith("aux_conv"):
                x = module(x)
            else:
                if x.shape[1] != module.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, emb)
        return x


class DhariwalUNet(nn.Module):
    """The ADM U-Net. forward as `SongUNet`; attention has 64 channels per head, embeddings scale and shift the second norm."""

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, *, label_dim: int = 0, augment_dim: int = 0, model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4), emb_mult: int = 4, num_blocks: int = 3, attn_resolutions: tuple[int, ...] = (32, 16, 8),
        dropout: float = 0.10,
    ):  # fmt: skip
        super().__init__()
        emb = model_channels * emb_mult
        init: dict[str, Any] = {"mode": "kaiming", "gain": math.sqrt(1 / 3), "bias_gain": math.sqrt(1 / 3)}
        zero: dict[str, Any] = {"mode": "kaiming", "gain": 0.0, "bias_gain": 0.0}
        block: dict[str, Any] = {"emb_channels": emb, "dropout": dropout, "init": init, "init_zero": zero}

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
                self.enc[f"{res}x{res}_down"] = UNetBlock(channels, channels, down=True, **block)
            skips.append(channels)
            for i in range(num_blocks):
                out = model_channels * mult
                self.enc[f"{res}x{res}_block{i}"] = UNetBlock(channels, out, heads=heads(res, out), **block)
                channels = out
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = UNetBlock(channels, channels, heads=channels // 64, **block)
                self.dec[f"{res}x{res}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{res}x{res}_up"] = UNetBlock(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                out = model_channels * mult
                self.dec[f"{res}x{res}_block{i}"] = UNetBlock(channels + skips.pop(), out, heads=heads(res, out), **block)
                channels = out
        self.out_norm = GroupNorm(channels, 1e-5)
        self.out_conv = Conv2d(channels, out_channels, 3, **zero)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and labels is not None:
            emb = emb + self.map_label(labels)
        emb = F.silu(emb)
        skips = []
        for module in self.enc.values():
            x = module(x, emb) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for module in self.dec.values():
            if x.shape[1] != module.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


ARCHITECTURES = {"ddpmpp": SongUNet, "ncsnpp": SongUNet, "adm": DhariwalUNet}
NCSNPP = {"embedding": "fourier", "noise_mult": 2, "encoder": "residual", "fir": (1, 3, 3, 1)}


class EDMPrecond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise, labels), the denoiser of Karras et al. 2022, eq. 7 and Table 1 (column "Ours").

    `arch` is "ddpmpp", "ncsnpp" or "adm"; further arguments go to the U-Net. forward(x [B, C, R, R], sigma [B] or scalar, label: class
    indices [B] int64, one-hot [B, label_dim], or None) -> denoised x [B, C, R, R], float32. `label_dim` 0: `label` must be None.
    Labels of -1 (or None) give the unconditional denoiser: an all-zero one-hot row.
    """

    def __init__(self, arch: str, img_resolution: int, img_channels: int, label_dim: int = 0, sigma_data: float = 0.5, **unet: Any):
        super().__init__()
        self.config = {"arch": arch, "img_resolution": img_resolution, "img_channels": img_channels, "label_dim": label_dim,
                       "sigma_data": sigma_data, **unet}  # fmt: skip
        if arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
        if arch == "ncsnpp":
            unet = {**NCSNPP, **unet}
        self.img_resolution, self.img_channels, self.label_dim, self.sigma_data = img_resolution, img_channels, label_dim, sigma_data
        self.model = ARCHITECTURES[arch](img_resolution, img_channels, img_channels, label_dim=label_dim, **unet)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + sigma**2).sqrt()
        c_noise = (sigma.log() / 4).reshape(-1).expand(len(x))
        f = self.model(c_in * x, c_noise, self.one_hot(label, len(x)), augment)
        return torch.addcmul(c_skip * x, c_out, f.to(torch.float32))

    def one_hot(self, label: Tensor | None, batch: int) -> Tensor | None:
        """Class indices [B] (-1: no class) or one-hot rows -> one-hot rows [B, label_dim] float32; None for an unconditional network."""
        if self.label_dim == 0:
            return None
        weight = next(self.parameters())
        if label is None:
            return torch.zeros(batch, self.label_dim, device=weight.device)
        if label.dtype.is_floating_point:
            return label
        classes = torch.arange(self.label_dim, device=label.device)
        return (label[:, None] == classes).to(torch.float32)
