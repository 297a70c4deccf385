"""Distribution matching by two denoisers, the teacher's and one of the student's samples: DMD (Yin et al. 2024),
Diff-Instruct (Luo et al. 2023).

A denoiser D states the score of noisy data, s(x_t) = (D(x_t; sigma) - x_t) / sigma^2. The gradient of the reverse KL
divergence between the noisy distributions of student and teacher with respect to a sample x is s_score - s_teacher,
which is (D_score - D_teacher) / sigma^2: both methods take the difference of the denoised images and weight it in their
own way. Nothing here is differentiated through the two networks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2o.diffusion.schedules import karras_sigma

LEVELS = 1000
"""Noise levels that `karras_index` chooses from."""


def index_sigma(index: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Level `index` of 0 .. 999 of Karras et al. 2022, eq. 5, ascending: 0 is sigma_min, 999 sigma_max. Any shape,
    float32."""
    return karras_sigma(1 - index.to(torch.float32) / (LEVELS - 1), sigma_min, sigma_max, rho)


@torch.no_grad()
def matching_gradient(x: Tensor, teacher: Tensor, score: Tensor, weight: str = "l1_teacher") -> Tensor:
    """(D_score - D_teacher) / W [B, C, H, W], detached: the direction in which x gets more probable to the student and
    less to the teacher.

    x: the student's samples; `teacher`, `score`: both denoisers at the same x_t = x + sigma eps; all [B, C, H, W].
    `weight` "l1_teacher": W is the mean of |x - D_teacher| over each sample (DMD, eq. 8; with sigma's factors: w_t =
    sigma^2 CHW / |x - D_teacher|_1 times the difference of the scores, eq. 7); "none": W = 1 (Diff-Instruct with
    sigma^2 as its weight of the scores). Values that are not finite, as from W = 0, become 0.
    """
    difference = (score - teacher).to(torch.float32)
    if weight == "l1_teacher":
        difference = difference / (x - teacher).to(torch.float32).abs().flatten(1).mean(1)[:, None, None, None]
    return difference.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def surrogate(x: Tensor, gradient: Tensor, reduce: str = "mean") -> Tensor:
    """1/2 |x - sg[x - g]|^2 per sample [B], whose derivative by x [B, C, H, W] is the given g, over CHW for `reduce`
    "mean" (DMD, as its authors train) and itself for "sum" (Diff-Instruct's sum of g x has the same one).

    It is written so that the value is |g|^2 / 2 and the derivative g to the last digit, which x - (x - g) is not where
    g is small beside x.
    """
    gradient = gradient.detach()
    return per_sample(0.5 * gradient.square() + gradient * (x - x.detach()), reduce)


def per_sample(values: Tensor, reduce: str = "mean") -> Tensor:
    """[B, C, H, W] -> [B]: "mean" or "sum" over CHW."""
    return values.flatten(1).mean(1) if reduce == "mean" else values.flatten(1).sum(1)
