"""DreamSim between two images of equal noise, and the diversity of a prompt's images (DreamDiv: Kang et al. 2024,
section 4.2), of embeddings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from d2o.errors import UserError


def dreamsim_distance(e1: Tensor, e2: Tensor) -> Tensor:
    """Embeddings [n, D] and [n, D] -> [n]: 1 - cosine, 0 for equal images (Fu et al. 2023, section 4). UserError:
    different shapes."""
    if e1.shape != e2.shape or e1.ndim != 2:
        raise UserError(f"DreamSim compares pairs of embeddings; these are {[*e1.shape]} and {[*e2.shape]}")
    return 1 - F.cosine_similarity(e1, e2, dim=1)


def dream_diversity(embeddings: Tensor, per_prompt: int) -> tuple[float, float]:
    """Embeddings [n, D], `per_prompt` consecutive rows of each prompt -> mean over prompts of the mean distance of its
    unordered pairs, and the standard deviation of the prompts (n - 1; 0 for a single prompt). In float64.

    UserError: fewer than two images a prompt, or rows that do not divide by `per_prompt`.
    """
    if per_prompt < 2:
        raise UserError(
            f"diversity is of the pairs of a prompt's images: {per_prompt} image(s) per prompt make none",
            "2 or more; 8 is the paper's",
        )
    n = len(embeddings)
    if not n or n % per_prompt:
        raise UserError(
            f"{n} images are no whole number of prompts with {per_prompt} images each",
            f"generate a multiple of {per_prompt}",
        )
    unit = F.normalize(embeddings.double(), dim=1).unflatten(0, (-1, per_prompt))
    # The cosines of all ordered pairs of a group sum to |sum of its vectors|^2, less the per_prompt of each with
    # itself.
    cosines = (unit.sum(1).square().sum(1) - unit.square().sum((1, 2))) / (per_prompt * (per_prompt - 1))
    values = 1 - cosines
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0
