"""Images of which a part is never trained on, and whether they have the classes that a classifier needs."""

from __future__ import annotations

import torch
from torch import Tensor

from d2o.data.images import ImageSet
from d2o.data.stored_latents import LatentSet
from d2o.data.triplets import TripletSet
from d2o.errors import UserError


def need_classes(images: ImageSet | LatentSet | TripletSet, method: str) -> None:
    """UserError: images without labels."""
    if not images.classes or images.labels is None:
        raise UserError(
            f"{images.name} has no labels; method {method} needs them", "give a folder with one sub-folder per class"
        )


def hold_out(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The images of n to train on, and that share of them that is only validated: indices int64, ascending."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
    held = int(share * n)
    return order[held:].sort().values, order[:held].sort().values
