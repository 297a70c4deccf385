"""How a raw network F becomes a denoiser: D(x; sigma) = c_skip x + c_out F(c_in x, c_noise). Karras et al. 2022, Table
1 and section 5.

`coefficients` of each kind take sigma [B, 1, 1, 1] and give c_skip, c_out, c_in (broadcastable to x) and c_noise (one
number a sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from d2o.errors import UserError, unknown

Coefficients = tuple[Tensor | float, Tensor, Tensor | float, Tensor]

VP_BETA_D, VP_BETA_MIN, VP_EPSILON_T, VP_STEPS = 19.9, 0.1, 1e-5, 1000
IDDPM_C1, IDDPM_C2, IDDPM_STEPS = 0.001, 0.008, 1000
CONSISTENCY_EPSILON = 0.002


def edm(sigma: Tensor, sigma_data: float) -> Coefficients:
    """Karras et al. 2022, column "Ours": inputs and training targets of unit variance."""
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma_data**2 + sigma**2).sqrt()
    return c_skip, c_out, c_in, sigma.log() / 4


def vp(sigma: Tensor, sigma_data: float) -> Coefficients:
    """Column "VP": F predicts the noise; c_noise is 999 t, with sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""
    t = ((VP_BETA_MIN**2 + 2 * VP_BETA_D * torch.log1p(sigma**2)).sqrt() - VP_BETA_MIN) / VP_BETA_D
    return 1.0, -sigma, 1 / (sigma**2 + 1).sqrt(), (VP_STEPS - 1) * t


def vp_sigma(t: float) -> float:
    """The noise level at time t in [0, 1] of the VP process."""
    return math.sqrt(math.expm1(0.5 * VP_BETA_D * t**2 + VP_BETA_MIN * t))


def ve(sigma: Tensor, sigma_data: float) -> Coefficients:
    """Column "VE": F predicts the negative noise."""
    return 1.0, sigma, 1.0, (0.5 * sigma).log()


def consistency(sigma: Tensor, sigma_data: float) -> Coefficients:
    """Song et al. 2023, appendix C: the identity at sigma 0.002 exactly. GDD's students have it (Zheng & Yang 2024,
    B.4)."""
    above = sigma - CONSISTENCY_EPSILON
    c_skip = sigma_data**2 / (above**2 + sigma_data**2)
    c_out = above * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    return c_skip, c_out, 1 / (sigma_data**2 + sigma**2).sqrt(), sigma.log() / 4


@cache
def iddpm_levels() -> tuple[float, ...]:
    """The 1001 noise levels of iDDPM's cosine schedule (column "iDDPM"), descending from 20291 to 0."""

    def alpha_bar(j: int) -> float:
        return math.sin(0.5 * math.pi * j / (IDDPM_STEPS * (IDDPM_C2 + 1))) ** 2

    u = [0.0]
    for j in range(IDDPM_STEPS, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), IDDPM_C1) - 1))
    return tuple(reversed(u))


CLOSED_FORMS: dict[str, Callable[[Tensor, float], Coefficients]] = {
    "edm": edm,
    "vp": vp,
    "ve": ve,
    "consistency": consistency,
}
PRECONDITIONINGS = (*CLOSED_FORMS, "iddpm")


def sigma_range(precond: str) -> tuple[float, float]:
    """The lowest and highest noise level that a network of this preconditioning is made for."""
    if precond == "vp":
        return vp_sigma(VP_EPSILON_T), vp_sigma(1.0)
    if precond == "ve":
        return 0.02, 100.0
    if precond == "iddpm":
        return iddpm_levels()[IDDPM_STEPS - 1], iddpm_levels()[0]
    return 0.0, math.inf


PARTS = ("decoder", "encoder", "encoder_decoder")
"""What a denoiser returns: the denoised image, its encoder's map, or (denoised, map)."""
Returned = Tensor | tuple[Tensor, ...]
"""The one or the ones that were asked for."""
DISC_MAPS = ("enc_last_mean", "mid_mean", "enc_last")
"""Where the map is taken: after the last block of the encoder, or after the two blocks in the U-Net's middle;
"enc_last": not the mean over its channels, but all of them."""


class Denoiser(nn.Module):
    """What all denoisers of the EDM family share: preconditioning, range of noise levels, labels, and the map of the
    encoder.

    denoiser(x, sigma, label, augment_labels=None, part="decoder"), with `part` one of `PARTS`. The map [B, 1, h, w]
    float32 is the mean over channels of the features that `set_disc_map` chose ("enc_last": the features themselves);
    "encoder_decoder" gives both of one pass. Zhou et al. 2025 (SiDA), section 4.2, discriminate by it.

    `precond` "edm", "vp", "ve", "iddpm" or "consistency"; `sigma_min`, `sigma_max` replace that one's range (samplers
    stay inside it). `sigma_data` (edm, consistency): the data's standard deviation. iDDPM holds its noise levels as
    buffer `u`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        sigma_data: float = 0.5,
        precond: str = "edm",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ):
        super().__init__()
        if precond not in PRECONDITIONINGS:
            raise unknown("preconditioning", precond, PRECONDITIONINGS)
        self.img_resolution, self.img_channels, self.label_dim, self.sigma_data = (
            img_resolution,
            img_channels,
            label_dim,
            sigma_data,
        )
        low, high = sigma_range(precond)
        self.precond, self.sigma_min, self.sigma_max = (
            precond,
            low if sigma_min is None else sigma_min,
            high if sigma_max is None else sigma_max,
        )
        if not 0 <= self.sigma_min < self.sigma_max:
            raise UserError(
                f"network: sigma_min {self.sigma_min} and sigma_max {self.sigma_max} are no range of noise levels"
            )
        self.u: Tensor
        if precond == "iddpm":
            self.register_buffer("u", torch.tensor(iddpm_levels(), dtype=torch.float32))

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """sigma [B, 1, 1, 1] float32 -> c_skip, c_out, c_in, c_noise."""
        if self.precond == "iddpm":
            return (
                1.0,
                -sigma,
                1 / (sigma**2 + 1).sqrt(),
                (IDDPM_STEPS - 1 - self._nearest_level(sigma)).to(torch.float32),
            )
        return CLOSED_FORMS[self.precond](sigma, self.sigma_data)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise levels that the network knows, same shape and dtype: sigma itself, except for iDDPM's
        discrete ones."""
        sigma = torch.as_tensor(sigma)
        if self.precond != "iddpm":
            return sigma
        return self.u.to(sigma.device)[self._nearest_level(sigma)].to(sigma.dtype)

    def _nearest_level(self, sigma: Tensor) -> Tensor:
        return (sigma.to(torch.float32)[..., None] - self.u.to(sigma.device)).abs().argmin(-1)

    def one_hot(self, label: Tensor | None, batch: int) -> Tensor | None:
        """Class indices [B] (-1: no class) or one-hot rows -> one-hot rows [B, label_dim] float32; None for an
        unconditional network."""
        if self.label_dim == 0:
            return None
        weight = next(self.parameters())
        if label is None:
            return torch.zeros(batch, self.label_dim, device=weight.device)
        if label.dtype.is_floating_point:
            return label
        classes = torch.arange(self.label_dim, device=label.device)
        return (label[:, None] == classes).to(torch.float32)


def check_part(part: str) -> None:
    """UserError: not one of `PARTS`."""
    if part not in PARTS:
        raise unknown("part of a denoiser", part, PARTS)


def map_of(features: Tensor, disc_map: str) -> Tensor:
    """Features [B, c, h, w] -> the map, float32: [B, 1, h, w], or all of them."""
    features = features.to(torch.float32)
    return features if disc_map == "enc_last" else features.mean(1, keepdim=True)


def set_disc_map(network: nn.Module, kind: str) -> None:
    """Where a denoiser takes its map: one of `DISC_MAPS`; of a new network "enc_last_mean". UserError: another one."""
    if kind not in DISC_MAPS:
        raise unknown("disc_map", kind, DISC_MAPS)
    for module in network.modules():
        if hasattr(module, "disc_map"):
            module.disc_map = kind  # type: ignore[assignment]
