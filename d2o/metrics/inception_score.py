"""Inception Score: how sure a classifier is of each image, and how evenly it spreads its answers over the classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2o.errors import UserError, unknown

MODES = ("torch_fidelity", "edm_order", "adm")
ADM_SPLIT = 5000
ROWS = 4096  # logits that are in float64 at one time


class InceptionScore(NamedTuple):
    """Mean and standard deviation (population; None with mode "adm", which reports none) over `splits` parts of the
    images."""

    mean: float
    std: float | None
    splits: int


def inception_score(logits: Tensor, splits: int = 10, mode: str = "torch_fidelity", seed: int = 2020) -> InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) of each split of the images (Salimans et al. 2016, section 4), over the logits [n,
    classes] of any float type.

    `mode`: how images fall into splits. "torch_fidelity": `splits` parts of the images shuffled by numpy's
    RandomState(seed); "edm_order": `splits` parts in the order of generation (StyleGAN2, EDM, SiD; biased if images
    come ordered by class); "adm": parts of 5000 in order, the last may be smaller, mean only (`splits` is not used).
    Softmax in float64, as torch-fidelity.
    UserError: fewer images than splits, values that are not finite, unknown mode.
    """
    if mode not in MODES:
        raise unknown("inception score mode", mode, MODES)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(f"logits of shape {tuple(logits.shape)} where [n, classes] is expected")
    n = len(logits)
    if splits < 1:
        raise UserError(f"the number of splits must be at least 1, not {splits}")
    if n < (1 if mode == "adm" else splits):
        raise UserError(
            f"the inception score of {n} images in {splits} splits",
            "generate more images (papers use 50,000), or ask for fewer splits",
        )
    order = torch.arange(n)
    if mode == "torch_fidelity":
        order = torch.from_numpy(np.random.RandomState(seed).permutation(n))
    if mode == "adm":
        parts = list(order.split(ADM_SPLIT))
    else:
        parts = [order[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    scores = [_score(logits, part) for part in parts]
    return InceptionScore(float(np.mean(scores)), None if mode == "adm" else float(np.std(scores)), len(scores))


def _score(logits: Tensor, images: Tensor) -> float:
    """exp of the mean over images of sum p log p, less sum q log q of their mean q: the mean KL(p || q)."""
    total = torch.zeros(logits.shape[1], dtype=torch.float64)
    sure = 0.0
    for index in images.split(ROWS):
        log_p = logits.detach()[index.to(logits.device)].to("cpu", torch.float64).log_softmax(1)
        if not bool(torch.isfinite(log_p).all()):
            raise UserError(
                "the logits hold values that are not finite", "the extractor's weights or the images are damaged"
            )
        p = log_p.exp()
        total += p.sum(0)
        sure += float((p * log_p).sum())
    q = total / len(images)
    return float(np.exp(sure / len(images) - float(torch.special.xlogy(q, q).sum())))
