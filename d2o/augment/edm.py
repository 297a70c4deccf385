"""The augmentation that EDM's denoisers are trained with, and are told of (Karras et al. 2022, appendix F.2): geometric
only, not leaking.

The network gets nine numbers of each image, all 0 when nothing happened to it: [left-right flip, up-down flip, scale,
cos a - 1, sin a, stretch cos r, stretch sin r, shift right, shift down], with the rotation a and the direction r of the
stretching; scale, stretch and shifts are in units of their spread.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from d2o.augment import geometry
from d2o.augment.ada import RandomNumbers

LABELS = 9
SCALE, STRETCH = 0.2, 0.2  # standard deviations of log2
SHIFT = 0.125  # standard deviation, of the image's side
TURNED = 0.5  # probability that the stretching has a direction of its own


def augment(images: Tensor, p: float, randn: RandomNumbers, rand: RandomNumbers) -> tuple[Tensor, Tensor]:
    """images [B, C, R, R] in [-1, 1] -> (images, labels [B, 9]), float32.

    Half of the images are mirrored left to right whatever p > 0 is; each other transform happens with probability p
    (up-down flips p / 2). randn and rand are the methods of a `Draws`; always the same count of numbers is drawn.
    """
    chance, uniform, normal = rand(5), rand(5).unbind(1), randn(4)
    yflips, scales, turns, stretches, moves = (chance < p).unbind(1)
    xflip = (uniform[0] < 0.5).to(torch.float32)
    yflip = ((uniform[1] < 0.5) & yflips).to(torch.float32)
    scale = torch.where(scales, normal[:, 0], 0)
    angle = torch.where(turns, (2 * uniform[2] - 1) * math.pi, 0)
    stretch = torch.where(stretches, normal[:, 1], 0)
    direction = torch.where(uniform[4] < TURNED, (2 * uniform[3] - 1) * math.pi, 0)
    shift = torch.where(moves[:, None], normal[:, 2:], 0)
    labels = [
        xflip,
        yflip,
        scale,
        angle.cos() - 1,
        angle.sin(),
        stretch * direction.cos(),
        stretch * direction.sin(),
        *shift.unbind(1),
    ]

    device = images.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        x = images.to(torch.float32)
        x = torch.where(_each(xflip > 0), x.flip(3), x)
        x = torch.where(_each(yflip > 0), x.flip(2), x)
        larger, wider = 2 ** (SCALE * scale), 2 ** (STRETCH * stretch)
        moved = geometry.after(
            geometry.scaling(larger, larger),
            geometry.rotation(angle),
            geometry.rotation(-direction),
            geometry.scaling(wider, 1 / wider),
            geometry.rotation(direction),
            geometry.translation(shift * (SHIFT * x.shape[-1])),
        )
        x = torch.where(_each(scales | turns | stretches | moves), geometry.warp(x, moved), x)
    return x, torch.stack(labels, 1)


def _each(what: Tensor) -> Tensor:
    return what[:, None, None, None]
