"""Orders in which training sees its data: random, and a function of seeds alone."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def mix(*parts: int | str) -> int:
    """A 63-bit seed from several numbers or words."""
    return int.from_bytes(hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest(), "big") >> 1


def shuffled(n: int, seed: int, epoch: int, *what: int | str) -> np.ndarray:
    """A permutation of 0 .. n - 1 for that epoch; `what` tells several of one epoch apart."""
    generator = torch.Generator().manual_seed(mix(seed, "epoch", epoch, *what))
    return torch.randperm(n, generator=generator).numpy()
