"""Latent spaces: the latents of an autoencoder, as a diffusion model sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.safetensors_io import tensors_sha256
from d2o.networks.full_precision import full_precision

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from diffusers.configuration_utils import FrozenDict

PIXELS = "pixels"
UNNAMED = "unnamed"
"""Latents of which a file of an older version does not say whose they are."""
AT_ONCE = 4 * 512 * 512
"""Pixels that are decoded or encoded at once; about 10 GB at the width of Stable Diffusion's autoencoder."""


@dataclass(frozen=True)
class SpaceNumbers:
    """What is to know of a latent space without its autoencoder. A diffusion model sees x = (raw - shift) * scale of
    the autoencoder's latents raw [B, channels, H / factor, W / factor], both numbers alike for all channels or one for
    each; `low`: what the autoencoder's pixels begin with (-1, or 0), up to 1."""

    channels: int
    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0
    factor: int = 8
    low: float = -1.0

    def normalise(self, raw: Tensor) -> Tensor:
        """The autoencoder's latents -> what the diffusion model sees. ValueError: of another shape."""
        scale, shift = self._columns(raw)
        return (raw - shift) * scale

    def raw(self, x: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        scale, shift = self._columns(x)
        return x / scale + shift

    def _columns(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"latents of this space have shape [B, {self.channels}, h, w], not {list(x.shape)}")
        return _column(self.scale, x), _column(self.shift, x)


def _column(number: float | tuple[float, ...], x: Tensor) -> Tensor | float:
    if isinstance(number, tuple):
        return torch.tensor(number, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
    return number


class LatentSpace:
    """Images [B, C, H, W] in [-1, 1] <-> latents [B, c, h, w] as the diffusion model sees them.

    `name`: one of `d2o.spaces.load.SPACES`, or where the autoencoder lies; `numbers`: its scale and shift; `load` gives
    the autoencoder (a diffusers AutoencoderKL), which happens when something is encoded or decoded, not before.
    Everything is computed in float32, whatever is asked for around it (SDXL's decoder overflows in half precision), and
    but for `pixels` a few images at a time and without gradients.
    """

    def __init__(
        self,
        name: str,
        numbers: SpaceNumbers,
        load: Callable[[], AutoencoderKL],
        device: str | torch.device = "cpu",
        revision: str | None = None,
        published: bool = False,
    ):
        self.published = published  # at one place, in one revision
        self.name, self.numbers, self.device, self.revision = name, numbers, torch.device(device), revision
        self._load = load
        self._autoencoder: AutoencoderKL | None = None
        self._sha256 = ""

    @classmethod
    def of(cls, name: str, autoencoder: AutoencoderKL, device: str | torch.device = "cpu") -> LatentSpace:
        """That of an AutoencoderKL that is there already. UserError: it scales its latents channel by channel."""
        return cls(name, numbers_of(autoencoder.config, name), lambda: autoencoder, device)

    def __deepcopy__(self, memo: object) -> LatentSpace:
        return self  # frozen, and shared by all who copy what holds it

    @property
    def autoencoder(self) -> AutoencoderKL:
        """On the device, frozen and in eval mode. UserError: it is nowhere, or damaged."""
        if self._autoencoder is None:
            self._autoencoder = self._load().to(self.device).eval().requires_grad_(False)
        return self._autoencoder

    @property
    def loaded(self) -> AutoencoderKL | None:
        """The autoencoder, if somebody has needed it; None otherwise."""
        return self._autoencoder

    @property
    def record(self) -> JsonObject:
        """What a file says of it that needs it: name and revision, and sha256 of the autoencoder's weights where they
        are no published ones."""
        return {"name": self.name, "revision": self.revision} | ({} if self.published else {"sha256": self.sha256})

    @property
    def sha256(self) -> str:
        """Over the autoencoder's weights."""
        if not self._sha256:
            self._sha256 = tensors_sha256(self.autoencoder.state_dict())
        return self._sha256

    def check(self, record: JsonObject, who: str) -> None:
        """UserError: this is not the space that `record` is of."""
        if (wanted := record.get("sha256")) and wanted != self.sha256:
            raise UserError(
                f"{who} makes latents of an autoencoder {record['name']} with sha256 {wanted[:12]}; the one here has"
                f" {self.sha256[:12]}",
                "put the one that it was trained with in its place",
            )

    def image_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the images of latents (c, h, w)."""
        return 3, shape[-2] * self.numbers.factor, shape[-1] * self.numbers.factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] in [-1, 1] -> mean and standard deviation of the autoencoder's own latents, which is what
        EDM2's data sets store."""
        x = images.to(self.autoencoder.device, torch.float32)
        x = x if self.numbers.low == -1 else (x + 1) / 2
        with torch.autocast(x.device.type, enabled=False):
            found = [
                self.autoencoder.encode(part.to(self.autoencoder.dtype)).latent_dist
                for part in x.split(self._at_once(x.shape[-2] * x.shape[-1]))
            ]
        return torch.cat([part.mean for part in found]).float(), torch.cat([part.std for part in found]).float()

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1], or stored means and standard deviations [B, 2 c, h, w] of the autoencoder's
        latents -> latents [B, c, h, w], drawn by standard normal `noise` of that shape."""
        if noise.device.type == "meta":  # a plan, which needs no autoencoder
            return torch.empty_like(noise)
        mean, std = images.chunk(2, dim=1) if images.shape[1] == 2 * self.numbers.channels else self.moments(images)
        return self.numbers.normalise(mean + std * noise)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, c, h, w] -> images [B, C, H, W] float32 in [-1, 1]."""
        size = x.shape[-2] * x.shape[-1] * self.numbers.factor**2
        return torch.cat([self.pixels(part).clamp(-1, 1) for part in x.split(self._at_once(size))])

    def pixels(self, x: Tensor) -> Tensor:
        """`decode` for a loss: all at once, not limited to [-1, 1], and gradients flow to the latents."""
        vae = self.autoencoder
        raw = self.numbers.raw(x.to(vae.device, torch.float32)).to(vae.dtype)
        with full_precision(raw.device.type):
            images = vae.decode(raw, return_dict=False)[0].float()
        return images if self.numbers.low == -1 else images * 2 - 1

    def _at_once(self, pixels: int) -> int:
        return max(1, AT_ONCE // pixels)


class Pixels(LatentSpace):
    """The space of models that work on images themselves."""

    def __init__(self) -> None:
        super().__init__(PIXELS, SpaceNumbers(3, 1.0, factor=1), lambda: None)

    def image_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        return shape[0], shape[1], shape[2]

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    def pixels(self, x: Tensor) -> Tensor:
        return x


def numbers_of(config: FrozenDict, name: str) -> SpaceNumbers:
    """The numbers that an AutoencoderKL's own configuration states. UserError: another scale for each channel."""
    if any(getattr(config, key, None) is not None for key in ("latents_mean", "latents_std")):
        what = "its autoencoder scales latents per channel (latents_mean), which d2o does not support"
        raise UserError(f"{name}: {what}")
    factor = 2 ** (len(config.block_out_channels) - 1)
    return SpaceNumbers(config.latent_channels, float(config.scaling_factor), float(config.shift_factor or 0.0), factor)
