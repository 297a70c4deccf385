"""The ways in which the known tools bring an image to the size of their feature network. They differ, and so do the
numbers: FID computed through one is not comparable with FID through another, above all on small images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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


def clean_pil(images: Tensor, size: int) -> Tensor:
    """uint8 images [n, C, h, w] on any device -> float32 [n, C, size, size] in [0, 255] on the same: clean-fid's
    "clean" resize.

    Each channel by Pillow in single precision, bicubic with antialiasing, also where it enlarges; clipped to [0, 255],
    not rounded (Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", arXiv:2104.11222).
    """
    planes = images.flatten(0, 1).cpu().numpy().astype(np.float32)
    resized = np.empty((len(planes), size, size), np.float32)

    def one(index: int) -> None:
        plane = Image.fromarray(planes[index]).resize((size, size), Image.Resampling.BICUBIC)
        np.clip(np.asarray(plane), 0, 255, out=resized[index])

    # Pillow works outside Python's lock.
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        list(pool.map(one, range(len(planes))))
    return torch.from_numpy(resized).unflatten(0, images.shape[:2]).to(images.device)


def clean_torch(images: Tensor, size: int) -> Tensor:
    """uint8 images [n, C, h, w] -> float32 [n, C, size, size] in [0, 255]: `clean_pil` as torch computes it, on the
    images' device.

    No published tool does this. On random noise it differs from `clean_pil` by up to 0.004 of 255; it is faster on an
    accelerator.
    """
    x = images.to(torch.float32)
    return F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp_(0, 255)


def torch_bilinear(x: Tensor, size: int) -> Tensor:
    """Float images [n, C, h, w] in [0, 1] -> [n, C, size, size]: pytorch-fid's resize, which clean-fid calls
    "legacy_pytorch".

    The source of pixel i is (i + 1/2) * in / out - 1/2; no antialiasing when it shrinks.
    """
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
