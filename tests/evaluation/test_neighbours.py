"""Nearest training images: copies are found, fresh images are not taken for copies, and what is shown is what was
searched."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2o.errors import UserError
from d2o.evaluation.neighbours import neighbours_record


def images(n: int, seed: int, side: int = 6, channels: int = 1) -> Tensor:
    return torch.randint(
        0, 256, (n, channels, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def flat(x: Tensor) -> Tensor:
    return x.flatten(1).float()


def decoded(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def tile(sheet: np.ndarray, row: int, column: int, side: int) -> np.ndarray:
    return sheet[row * side : (row + 1) * side, column * side : (column + 1) * side]


def test_copies_come_first_and_fresh_images_are_as_far_as_real_ones() -> None:
    real, fresh = images(300, 0), images(100, 1)
    fresh[[13, 57]] = real[[200, 7]]
    found = neighbours_record(fresh, flat(fresh), flat(real), lambda i: real[i], k=2, rows=6, extractor="pixels")
    assert found["closest"]["samples"][:2] == [13, 57] and [j[0] for j in found["closest"]["neighbours"][:2]] == [
        200,
        7,
    ]
    assert [d[0] for d in found["closest"]["distances"][:2]] == [0, 0] and found["closest"]["distances"][2][0] > 0
    assert found["closer"] == pytest.approx(0.02) and found["closer_real"] == 0
    assert found["median"] == pytest.approx(found["median_real"], rel=0.02)  # of one distribution
    assert (found["n"], found["n_ref"], found["k"], found["columns"], found["extractor"]) == (100, 300, 2, 3, "pixels")
    assert json.loads(json.dumps(found)) == found


def test_distances_are_those_of_a_full_search() -> None:
    real, fresh = images(50, 0), images(20, 1)
    found = neighbours_record(fresh, flat(fresh), flat(real), lambda i: real[i], k=3, rows=40)
    full = torch.cdist(flat(fresh).double(), flat(real).double()).topk(3, largest=False)
    assert found["spaced"]["samples"] == list(range(20)) and found["spaced"]["neighbours"] == full.indices.tolist()
    assert np.allclose(found["spaced"]["distances"], full.values, rtol=1e-6)
    among = torch.cdist(flat(real).double(), flat(real).double()).fill_diagonal_(torch.inf).min(1).values
    assert found["median_real"] == pytest.approx(float(among.median()), rel=1e-6)
    own = full.values[:, 0] / among.median()
    assert np.allclose(
        found["curve"]["sample"], torch.quantile(own, torch.linspace(0, 1, 21, dtype=torch.float64)), rtol=1e-5
    )


def test_pictures_are_the_sample_and_its_neighbours_row_by_row() -> None:
    real, fresh = images(30, 0), images(9, 1)
    found = neighbours_record(fresh, flat(fresh), flat(real), lambda i: real[i], k=2, rows=6)
    assert found["spaced"]["samples"] == [0, 4, 8]  # evenly spaced, not chosen
    sheet = decoded(found["spaced"]["png"])
    assert sheet.shape == (18, 18)
    for row, (i, near) in enumerate(zip(found["spaced"]["samples"], found["spaced"]["neighbours"], strict=True)):
        assert (tile(sheet, row, 0, 6) == fresh[i, 0].numpy()).all()
        for column, j in enumerate(near, 1):
            assert (tile(sheet, row, column, 6) == real[j, 0].numpy()).all()


def test_references_of_another_size_or_colour_are_brought_to_the_samples() -> None:
    real, fresh = images(10, 0, side=12), images(4, 1, side=6, channels=3)
    found = neighbours_record(fresh, torch.rand(4, 5), torch.rand(10, 5), lambda i: real[i], k=3, rows=4)
    assert decoded(found["spaced"]["png"]).shape == (12, 24, 3)
    large = images(3, 2, side=256)
    assert decoded(
        neighbours_record(large, torch.rand(3, 5), torch.rand(10, 5), lambda i: real[i], k=1, rows=2)["spaced"]["png"]
    ).shape == (128, 256)


def test_doubles_among_the_reference_are_counted_as_near() -> None:
    real = images(20, 0)
    real[10:] = real[:10]
    found = neighbours_record(images(5, 1), flat(images(5, 1)), flat(real), lambda i: real[i], k=1)
    assert found["median_real"] == 0 and found["closer"] == 0 and all(np.isfinite(found["curve"]["sample"]))


def test_too_few_references_are_refused() -> None:
    real, fresh = images(3, 0), images(5, 1)
    with pytest.raises(UserError, match="3 nearest training images need at least 4 reference images, not 3"):
        neighbours_record(fresh, flat(fresh), flat(real), lambda i: real[i], k=3)
    with pytest.raises(ValueError, match="5 samples, 4 rows"):
        neighbours_record(fresh, flat(fresh)[:4], flat(images(9, 0)), lambda i: real[i])
