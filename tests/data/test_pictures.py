"""Sheets of images: large enough, labelled, filled, and the same bytes every time."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2o.data.pictures import (
    GAP,
    SIDE,
    Layout,
    columns_for,
    draw_sheet,
    enlargement,
    from_png,
    lay_out,
    shortened,
    to_png,
)


def images(n: int, channels: int = 1, size: int = 8) -> Tensor:
    """Image i is of value 10 + i."""
    return (torch.arange(n) + 10).to(torch.uint8)[:, None, None, None].expand(n, channels, size, size).contiguous()


def cells(picture: Image.Image, values: range) -> dict[int, list[int]]:
    """value -> [left, top, width, height] of the image of that value."""
    pixels = np.asarray(picture.convert("L"))
    found = {}
    for value in values:
        xs, ys = (np.nonzero((pixels == value).sum(axis) >= SIDE // 2)[0] for axis in (0, 1))  # letters are smaller
        if len(xs):
            found[value] = [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1]
    return found


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (4, 2), (7, 4), (10, 5), (12, 4), (30, 6), (60, 10), (64, 8)])
def test_columns_fit_the_number(n: int, columns: int) -> None:
    assert columns_for(n) == columns
    assert all(-m % columns_for(m) <= 3 and (m - 1) // columns_for(m) < columns_for(m) for m in range(1, 100))


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_are_not() -> None:
    assert [enlargement(s, s) for s in (8, 28, 32, 64, 65, 512)] == [8, 3, 2, 1, 1, 1]
    picture = draw_sheet([("", images(4))], lay_out(4))
    assert picture.mode == "L" and picture.size == (2 * SIDE + 3 * GAP, 2 * SIDE + 3 * GAP)
    assert cells(picture, range(10, 14)) == {10 + i: [GAP + i % 2 * 68, GAP + i // 2 * 68, 64, 64] for i in range(4)}
    assert draw_sheet([("", images(2, 3, 32))], lay_out(2)).mode == "RGB"


def test_few_classes_have_rows_of_their_own() -> None:
    layout = lay_out(9, [1, 0, 0, 1, 1, 0, 0, 1, 1])
    assert layout == Layout([1, 2, 5, 6, 0, 3, 4, 7], 4, rows=["class 0", "class 1"])  # one of nine is left out
    many = lay_out(48, [i % 2 for i in range(48)])
    assert many.columns == 12 and many.rows == ["class 0", "", "class 1", ""]
    plain, labelled = draw_sheet([("", images(8))], Layout(list(range(8)), 4)), draw_sheet([("", images(9))], layout)
    assert labelled.height == plain.height and labelled.width > plain.width
    assert (np.asarray(labelled)[:, : labelled.width - plain.width] < 128).any(), "no label is written"


def test_uneven_classes_are_named_below_each_image() -> None:
    layout = lay_out(5, [7, 2, 7, 7, 2])
    assert layout == Layout([1, 4, 0, 2, 3], 5, captions=["class 2", "class 2", "class 7", "class 7", "class 7"])
    each_once = lay_out(4, [0, 1, 2, 3], {0: "a cat", 1: "a dog", 2: "a " + "very " * 50 + "long prompt", 3: "猫"})
    assert each_once.captions[:2] == ["a cat", "a dog"] and each_once.columns == 2
    places = cells(draw_sheet([("", images(4))], each_once), range(10, 14))
    assert len(places) == 4 and places[12][1] - places[10][1] > SIDE + 2 * 12  # room for two lines below


def test_blocks_stand_side_by_side_under_their_titles() -> None:
    picture = draw_sheet([("teacher", images(4)), ("student", images(4, 3) + 100)], lay_out(4))
    left, right = cells(picture, range(10, 14)), cells(picture, range(110, 114))
    assert picture.mode == "RGB" and all(
        right[v + 100][0] > left[13][0] + SIDE and right[v + 100][1] == left[v][1] for v in left
    )
    assert (np.asarray(picture)[: left[10][1]] < 128).any()
    headed = draw_sheet([("", images(4))], Layout([0, 1, 2, 3], 4), ["0.00", "0.33", "0.67", "1.00"])
    assert (np.asarray(headed)[: cells(headed, range(10, 14))[10][1] - 1] < 128).any()


def test_equal_images_give_equal_bytes() -> None:
    made = [draw_sheet([("x", images(6))], lay_out(6, [0, 0, 0, 1, 1, 1])).tobytes() for _ in range(2)]
    assert made[0] == made[1]


def test_long_texts_are_cut_with_an_ellipsis() -> None:
    assert shortened("a cat", 64) == "a cat" and shortened("two\n lines", 100) == "two lines"
    cut = shortened("a photograph of an astronaut riding a horse " * 100_000, 64)
    assert cut.endswith("…") and 3 < len(cut) < 20


def test_a_sheet_of_a_result_comes_apart_again() -> None:
    made = images(5, 3)
    parts = from_png(to_png(made, 3), 5, 3)
    assert len(parts) == 5
    for part, image in zip(parts, made, strict=True):  # pixel by pixel
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(base64.b64decode(part)))), image.permute(1, 2, 0).numpy()
        )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("png", ["", "!", base64.b64encode(b"\x89PNG damaged").decode(), "huge"])
def test_what_is_no_sheet_is_refused(png: str) -> None:
    if png == "huge":
        data = io.BytesIO()
        Image.new("1", (10_000, 10_000)).save(data, "PNG")
        png = base64.b64encode(data.getvalue()).decode()
    with pytest.raises(ValueError):
        from_png(png, 4, 2)
