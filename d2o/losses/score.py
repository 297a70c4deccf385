"""The losses of score identity distillation: SiD (Zhou et al. 2024) and its adversarial form SiDA (Zhou et al. 2025).

f is the teacher's denoiser (the true score), g the score network's (the score of what the student makes), both of x_t =
x + sigma eps; x are the student's images. Nothing here has a state; noise levels are [B, 1, 1, 1], images [B, C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o.errors import unknown
from d2o.losses.adversarial import fake_loss, generator_loss, real_loss

GEN_ADV = {"nonsat_bce": "nonsaturating", "linear_fakeness": "linear_fakeness", "saturating": "saturating"}
"""The forms of the student's adversarial loss by the names that recipes give them -> those of `generator_loss`."""
SMALLEST_ERROR = 1e-5


def lognormal_sigma(normal: Tensor, p_mean: float = -1.2, p_std: float = 1.2) -> Tensor:
    """The noise level exp(p_mean + p_std n) for standard normal n, any shape (Karras et al. 2022, Table 1)."""
    return (p_mean + p_std * normal).exp()


def edm_weight(sigma: Tensor, sigma_data: float = 0.5, logvar: Tensor | None = None) -> Tensor:
    """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, Table 1); with the network's
    uncertainty u = `logvar`, of the same shape, over e^u (Karras et al. 2024, eq. 21)."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight if logvar is None else weight / logvar.exp()


def mean_error(x: Tensor, true: Tensor, logvar: Tensor | None = None) -> Tensor:
    """W [B, 1, 1, 1]: the mean of |x - f| over a sample, at least 1e-5, detached. SiD's weight omega(t) a_t^2 /
    sigma_t^4 is C H W over their sum. With the score network's uncertainty u = `logvar` [B, 1, 1, 1] times e^u, as the
    published code for EDM2 has it."""
    error = (x.detach() - true.detach()).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=SMALLEST_ERROR)
    return error if logvar is None else error * logvar.detach().exp()


def sid_loss(x: Tensor, true: Tensor, fake: Tensor, alpha: float, weight: Tensor | None = None) -> Tensor:
    """The student's loss of each element [B, C, H, W] (SiD, eq. 23 and Algorithm 1): (f - g) ((f - x) - alpha (f - g))
    / W.

    Its gradient flows through x, f = `true` and g = `fake`, whose networks are frozen; W (`weight`, `mean_error` if
    None) is a constant. The algorithm's form (1 - alpha) (f - g)^2 + (f - g) (g - x) is the same number.
    """
    delta = true - fake
    return delta * ((true - x) - alpha * delta) / (mean_error(x, true) if weight is None else weight)


def denoising_loss(
    denoised: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float = 0.5, logvar: Tensor | None = None
) -> Tensor:
    """The score network's loss of each element [B, C, H, W]: lambda(sigma) (g - y)^2 (Karras et al. 2022, eq. 8); with
    the network's uncertainty u = `logvar` [B, 1, 1, 1] (Karras et al. 2024, eq. 21) over e^u, plus u."""
    loss = edm_weight(sigma, sigma_data, logvar) * (denoised - clean) ** 2
    return loss if logvar is None else loss + logvar


def batch_pool(values: Tensor, size: int, keep: Tensor | None = None) -> Tensor:
    """values [B] -> [B]: each the mean of its group, of `size` samples in a row (`size` divides B); size 1 changes
    nothing.

    `keep` [B] bool: samples that count; the others are left out of the means.
    """
    if size == 1 and keep is None:
        return values
    kept = torch.ones_like(values) if keep is None else keep.to(values.dtype)
    values = torch.where(kept > 0, values, 0).reshape(-1, size).sum(1) / kept.reshape(-1, size).sum(1).clamp(min=1)
    return values.repeat_interleave(size)


def generator_adversarial(
    logits: Tensor, size: int, kind: str = "nonsat_bce", clamp: float | None = 10.0, keep: Tensor | None = None
) -> Tensor:
    """What the student pays [B] for maps [B, 1, h, w] by which it is told from real images, the same for all samples of
    a group of `size`.

    `kind`: "nonsat_bce", -log D (the published code); "linear_fakeness", 1 - D (SiDA, eq. 7, which has no logarithm);
    "saturating", log(1 - D), with D the sigmoid of the map. `clamp`: maps beyond +-clamp give no gradient. `keep` as in
    `batch_pool`.
    """
    if clamp is not None:
        logits = logits.clamp(-clamp, clamp)
    if kind not in GEN_ADV:
        raise unknown("form of the student's adversarial loss", kind, GEN_ADV)
    return batch_pool(generator_loss(logits, GEN_ADV[kind]), size, keep)


def critic_adversarial(
    real: Tensor, fake: Tensor, size: int, real_weight: Tensor, fake_weight: Tensor, keep: Tensor | None = None
) -> Tensor:
    """The score network's loss as a critic, of each image [B] (SiDA, eq. 9): w / 2 (-log D(real) - log(1 -
    D(fake))).

    `real`, `fake`: maps [B, 1, h, w], each logarithm averaged over a group of `size` images; `real_weight`,
    `fake_weight` [B, 1, 1, 1]: the `edm_weight` of each. `keep` [B]: fakes that count.
    """
    of_real = real_weight.flatten() * batch_pool(real_loss(real), size)
    of_fake = fake_weight.flatten() * batch_pool(fake_loss(fake), size, keep)
    return 0.5 * (of_real + of_fake)
