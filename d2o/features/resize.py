"""TensorFlow's bilinear resize, which differs from torch's."""

from __future__ import annotations

import torch
from torch import Tensor


def tf_bilinear(x: Tensor, size: int) -> Tensor:
    """Float images [n, C, h, w] -> [n, C, size, size]: TensorFlow 1's resize_bilinear, which torch-fidelity, EDM,
    StyleGAN and ADM's evaluator use inside their network. The source of pixel i is i * in / out (no half-pixel shift);
    no antialiasing when it shrinks.
    """
    return _lerp(_lerp(x, size, 3), size, 2)  # across first, then down, rounded as TensorFlow does


def _lerp(x: Tensor, size: int, dim: int) -> Tensor:
    length = x.shape[dim]
    if length == size:
        return x
    # In single precision, as TensorFlow does: a coordinate just below a whole number counts as that number or not.
    place = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
    low = place.long().clamp_max_(length - 1)
    high = (low + 1).clamp_max_(length - 1)
    weight = (place - low).to(x)
    first = x.index_select(dim, low.to(x.device))
    step = x.index_select(dim, high.to(x.device)).sub_(first)
    return step.mul_(weight if dim == 3 else weight[:, None]).add_(first)
