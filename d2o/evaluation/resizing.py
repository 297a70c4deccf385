"""The ways in which the known tools bring 8-bit images to the size of their feature network. They differ, and so do the
numbers: FID computed through one is not comparable with FID through another, above all on small images.

TensorFlow's, which needs no 8-bit images, is `d2o.features.resize`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


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


def rounded_bicubic(images: Tensor, size: int) -> Tensor:
    """uint8 images [n, C, H, W] -> float32 [n, C, size, size] of whole numbers 0..255; the sides' ratio is not kept.

    Pillow's bicubic filter on 8-bit images, which DreamSim's preprocessing uses: antialiased; across, then down,
    rounded after each. Few pixels differ from Pillow's, by a level. (Images narrower but higher than `size` pixels
    Pillow resizes in the other order.)
    """
    x = images.float()
    for shape in ((x.shape[2], size), (size, size)):
        if tuple(x.shape[2:]) != shape:
            x = F.interpolate(x, shape, mode="bicubic", antialias=True, align_corners=False).round().clamp(0, 255)
    return x
