"""StyleGAN2's synthesis network and critic (Karras et al. 2020, section 4.1 and appendix B; Karras et al. 2020b for the
small sizes).

The synthesis network has skip connections of RGB images. The critic is plain ("orig") or residual and can be told a
time t, as the critics of denoising diffusion GANs are (Xiao et al. 2022) and that of SPI-GAN is (Choi et al. 2022,
section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from d2o.errors import UserError, unknown
from d2o.networks.config import Config
from d2o.networks.fir import fir_taps, up2
from d2o.networks.style_layers import MODULATIONS, ModulatedConv, lrelu

NOISE_MODES = ("random", "const", "none")


def channel_table(img_resolution: int, base: int = 32768, max_channels: int = 512) -> dict[int, int]:
    """{4: c, 8: c, ... up to the image's resolution: c} with c = min(base / resolution, max_channels).

    UserError: the resolution is no power of 2 of at least 8, or no channel is left.
    """
    if img_resolution < 8 or img_resolution & (img_resolution - 1):
        raise UserError(f"style networks make images of 8, 16, 32, ... pixels; {img_resolution} is no such size")
    table = {2**k: min(base // 2**k, max_channels) for k in range(2, img_resolution.bit_length())}
    if min(table.values()) < 1:
        raise UserError(
            f"network: base {base} and max_channels {max_channels} leave no channel at {img_resolution} pixels"
        )
    return table


class StyleLayer(nn.Module):
    """Modulated 3x3 convolution, noise of a learned strength (0 at first), bias, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, resolution: int, up: bool, how: str):
        super().__init__()
        self.resolution = resolution
        self.conv = ModulatedConv(in_channels, out_channels, w_dim, up=up, how=how)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_const: Tensor
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """`noise` [R, R], [B, 1, R, R] or None."""
        x = self.conv(x, w)
        if noise is not None:
            x = x + noise * self.noise_strength
        return lrelu(x + self.bias[:, None, None])


class ToImage(nn.Module):
    """Modulated 1x1 convolution without demodulation, and bias."""

    def __init__(self, in_channels: int, img_channels: int, w_dim: int, how: str):
        super().__init__()
        self.conv = ModulatedConv(in_channels, img_channels, w_dim, kernel=1, demodulate=False, how=how)
        self.bias = nn.Parameter(torch.zeros(img_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.conv(x, w) + self.bias[:, None, None]


class StyleSynthesis(nn.Module):
    """ws [B, num_ws, w_dim] -> images [B, img_channels, R, R], to be trained towards [-1, 1] (no tanh).

    A learned constant of 4x4, then per resolution two style layers (one at 4x4), the first of which doubles the size,
    and an image; the images of all resolutions are enlarged and summed. Channels: `channel_table`. Published sizes: 32
    px with base 32768 (512 everywhere, 8 style inputs), 256 px with base 16384 (512 up to 32 px, then 256, 128, 64; 14
    style inputs). A resolution's image takes the style input of the next resolution's first layer. `modulation`: see
    `modulated_conv`.
    UserError: a size, mode or shape that cannot be.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        w_dim: int = 512,
        base: int = 32768,
        max_channels: int = 512,
        modulation: str = "auto",
    ):
        super().__init__()
        if modulation not in MODULATIONS:
            raise unknown("network.modulation", modulation, MODULATIONS)
        self.config: Config = {
            "arch": "style_synthesis",
            "img_resolution": img_resolution,
            "img_channels": img_channels,
            "w_dim": w_dim,
            "base": base,
            "max_channels": max_channels,
            "modulation": modulation,
        }
        self.img_resolution, self.img_channels, self.w_dim = img_resolution, img_channels, w_dim
        self.channels = channel_table(img_resolution, base, max_channels)
        self.num_ws = 2 * len(self.channels)
        self.const = nn.Parameter(torch.randn(self.channels[4], 4, 4))
        self.layers = nn.ModuleList([StyleLayer(self.channels[4], self.channels[4], w_dim, 4, False, modulation)])
        self.images = nn.ModuleList([ToImage(self.channels[4], img_channels, w_dim, modulation)])
        for res, out in list(self.channels.items())[1:]:
            self.layers.append(StyleLayer(self.channels[res // 2], out, w_dim, res, True, modulation))
            self.layers.append(StyleLayer(out, out, w_dim, res, False, modulation))
            self.images.append(ToImage(out, img_channels, w_dim, modulation))
        self.taps: Tensor
        self.register_buffer("taps", fir_taps(), persistent=False)

    def broadcast(self, w: Tensor) -> Tensor:
        """One style for all inputs: [B, w_dim] -> [B, num_ws, w_dim], which is a copy that gradients can be taken
        of."""
        return w[:, None].repeat(1, self.num_ws, 1)

    @property
    def noise_shapes(self) -> list[tuple[int, int, int]]:
        """Per style layer, the shape of one sample's noise."""
        return [(1, layer.resolution, layer.resolution) for layer in self._layers()]

    def draw_noise(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> list[Tensor]:
        """Standard normal noise for each style layer, drawn where the generator lives, so that its seed means the same
        on every device."""
        device = device or self.const.device
        source = device if generator is None else generator.device
        return [
            torch.randn(batch, *shape, generator=generator, device=source).to(device) for shape in self.noise_shapes
        ]

    def forward(
        self,
        ws: Tensor,
        noise_mode: str = "random",
        generator: torch.Generator | None = None,
        noises: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """`noise_mode`: "random" (from `generator` if given), "const" (one fixed image per layer, part of the
        checkpoint), or "none".

        `noises`: instead of drawing, the noise of each layer [B, 1, r, r] (`noise_shapes`), for samples that must not
        depend on their batch.
        """
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise UserError(
                f"the synthesis network takes styles [B, {self.num_ws}, {self.w_dim}]; these are {[*ws.shape]}"
            )
        if noise_mode not in NOISE_MODES:
            raise unknown("noise mode", noise_mode, NOISE_MODES)
        layers = self._layers()
        given: Sequence[Tensor | None]
        if noises is not None:
            if len(noises) != len(layers):
                raise UserError(f"the synthesis network has {len(layers)} noise inputs; {len(noises)} were given")
            given = noises
        elif noise_mode == "random":
            given = self.draw_noise(ws.shape[0], generator, ws.device)
        elif noise_mode == "const":
            given = [layer.noise_const for layer in layers]
        else:
            given = [None] * len(layers)

        x = layers[0](self.const.expand(ws.shape[0], -1, -1, -1), ws[:, 0], given[0])
        image = self.images[0](x, ws[:, 1])
        for block, to_image in enumerate(list(self.images)[1:], start=1):
            first = 2 * block - 1
            x = layers[first](x, ws[:, first], given[first])
            x = layers[first + 1](x, ws[:, first + 1], given[first + 1])
            image = up2(image, self.taps) + to_image(x, ws[:, first + 2])
        return image

    def _layers(self) -> list[StyleLayer]:
        return list(self.layers)  # type: ignore[arg-type]
