"""The weights of the official projected critics of tests/golden/gdd, by the rule of tests/golden/README.md."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

FOLDER = Path(__file__).parents[1] / "golden" / "gdd"


def drawn(shape: list[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def official(name: str, first: int) -> dict[str, Tensor]:
    """Official name -> tensor, of what is random or trained in the critic `name`; `first`: its first seed."""
    state: dict[str, Tensor] = {}
    for i, (key, shape) in enumerate(sorted(json.loads((FOLDER / f"{name}_keys.json").read_text()).items())):
        if key.endswith(("weight_u", "weight_v")):
            continue
        r = drawn(shape, first + i)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape)
        elif key.endswith("running_var"):
            state[key] = 1 + 0.1 * r.abs()
        elif key.endswith(("running_mean", "bias")):
            state[key] = 0.1 * r
        elif key.endswith("weight_orig"):
            state |= spectral(key.removesuffix("_orig"), r, first + i)
        elif r.ndim == 4:
            transposed = key.endswith(("pretrained.layer1.4.weight", "pretrained.layer2.4.weight"))
            state[key] = r / (shape[0] if transposed else math.prod(shape[1:])) ** 0.5
        else:
            state[key] = r if r.ndim == 2 else 1 + 0.1 * r
    return state


def spectral(key: str, r: Tensor, seed: int) -> dict[str, Tensor]:
    """A matrix of one large singular value, with the vectors that belong to it."""
    matrix = r.flatten(1)
    rows, columns = matrix.shape
    u, v = (F.normalize(drawn([n], seed + more), dim=0) for n, more in ((rows, 10000), (columns, 20000)))
    matrix = matrix / (rows**0.5 + columns**0.5) + 2 * torch.outer(u, v)
    for _ in range(15):
        v = F.normalize(matrix.T @ u, dim=0)
        u = F.normalize(matrix @ v, dim=0)
    return {f"{key}_orig": matrix.view_as(r), f"{key}_u": u, f"{key}_v": v}
