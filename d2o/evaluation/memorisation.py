"""The reference's images nearest to some samples: whether a student repeats what it was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from d2o.evaluation.extractor import Device, Extractor
from d2o.evaluation.neighbours import neighbours_record
from d2o.evaluation.passes import generate
from d2o.evaluation.protocol import Settings
from d2o.evaluation.reference import Reference
from d2o.evaluation.sides import Measured, Side
from d2o.evaluation.subjects import Generator, Pictures
from d2o.inputs import JsonObject

SEARCHED = 512
"""Samples that are looked up: the first ones."""


def nearest_images(
    x: Generator | Pictures,
    run: Side,
    reference: Reference,
    extractor: Extractor,
    k: int,
    settings: Settings,
    device: Device,
) -> JsonObject:
    """`record["neighbours"]`: the first samples of x beside the k images of the reference (a set of images) whose
    features are nearest."""
    images, side = reference.subject, reference.side
    assert isinstance(images, Pictures) and isinstance(side, Measured) and isinstance(run, Measured), (
        "refused by `check`"
    )
    n = min(SEARCHED, run.columns.n)
    if isinstance(x, Pictures):
        samples = x.batch(range(n))[0]
    else:
        parts = [
            generate(
                x, settings, range(settings.seed + i, settings.seed + min(i + settings.batch, n)), device, settings.seed
            ).images.cpu()
            for i in range(0, n, settings.batch)
        ]
        samples = torch.cat(parts)

    def shown(indices: list[int]) -> Tensor:
        return images.batch(indices)[0]

    return neighbours_record(
        samples, run.column(extractor)[:n], side.column(extractor), shown, k, extractor=extractor.name
    )
