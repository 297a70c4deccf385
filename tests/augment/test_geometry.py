import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from d2o.augment import geometry
from d2o.augment.geometry import after, blit, quarter_turns, rotation, scaling, translation, warp


def one(*values):
    return torch.tensor([values], dtype=torch.float64) if len(values) > 1 else torch.tensor(values, dtype=torch.float64)


def blob(size, x=0.0, y=0.0, wide=1.0, high=1.0, angle=0.0):
    """An ellipse with soft edges around (x, y) pixels from the centre, turned counter-clockwise."""
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    dx, dy = at[None, :] - x, at[:, None] - y
    along, across = math.cos(angle) * dx - math.sin(angle) * dy, math.sin(angle) * dx + math.cos(angle) * dy
    return torch.exp(-((along / wide) ** 2 + (across / high) ** 2) / (2 * (size / 18) ** 2))[None, None]


def test_blits_are_exact():
    for size in (8, 9):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(blit(x, scaling(-one(1.0), one(1.0)).float()), x.flip(3))
        for k in range(4):
            assert torch.equal(blit(x, quarter_turns(one(k)).float()), x.rot90(k, (2, 3)))
        for right, down in ((0, 0), (1, 0), (0, -2), (3, 2)):
            wide = F.pad(x, (3, 3, 3, 3), mode="reflect")
            moved = wide[:, :, 3 - down : 3 - down + size, 3 - right : 3 - right + size]
            assert torch.equal(blit(x, translation(one(right, down)).float()), moved)


def test_order_of_a_product_is_the_order_of_the_transforms():
    x = torch.randn(1, 1, 8, 8)
    flip, turn, move = scaling(-one(1.0), one(1.0)), quarter_turns(one(1.0)), translation(one(2.0, 1.0))
    step_by_step = blit(blit(blit(x, flip), turn), move)
    at_once = blit(x, after(flip, turn, move))
    assert torch.equal(at_once[..., 1:, 2:], step_by_step[..., 1:, 2:])  # where no reflection is reflected


@pytest.mark.parametrize("size", [4, 8, 32])
def test_warp_by_the_identity_gives_the_image_back_up_to_the_edges(size):
    x = torch.randn(2, 3, size, size)
    nothing = translation(torch.zeros(2, 2))
    assert torch.allclose(warp(x, nothing), x, atol=1e-4)
    assert torch.allclose(warp(x.double(), nothing.double()), x.double(), atol=1e-9)


def test_warp_keeps_constants_whatever_the_map():
    maps = after(
        rotation(torch.rand(20) * 6),
        scaling(torch.rand(20) + 0.1, torch.rand(20) + 0.1),
        translation(20 * torch.randn(20, 2)),
    )
    assert torch.allclose(warp(torch.full((20, 1, 16, 16), 0.7), maps), torch.tensor(0.7), atol=1e-5)


def test_warp_puts_things_where_the_map_says():
    """Against the same shape drawn at its new place: the position is right to a tenth of a pixel."""
    size = 64  # the shape has soft edges of about 3 pixels
    x = blob(size, 3, -2, 1.6, 0.8, 0.4)
    cases = {
        "half a pixel": (translation(one(0.5, -0.25)), blob(size, 3.5, -2.25, 1.6, 0.8, 0.4)),
        "half a turn": (rotation(one(math.pi)), blob(size, -3, 2, 1.6, 0.8, 0.4)),
        "a turn": (rotation(one(0.7)), blob(size, *_turned(3, -2, 0.7), 1.6, 0.8, 1.1)),
        "larger": (scaling(one(1.3), one(1.3)), blob(size, 3.9, -2.6, 2.08, 1.04, 0.4)),
        "both": (
            after(scaling(one(0.8), one(0.8)), rotation(one(-1.0))),
            blob(size, *_turned(2.4, -1.6, -1.0), 1.28, 0.64, -0.6),
        ),
    }
    at = torch.arange(size - 28, dtype=torch.float64)
    for name, (map, expected) in cases.items():
        y, expected = (
            v[..., 14:-14, 14:-14] for v in (warp(x, map), expected)
        )  # without the reflections in the corners
        assert (y - expected).abs().max() < 0.03, name
        for dim in (2, 3):
            place = [float((v.sum(5 - dim).flatten() * at).sum() / v.sum()) for v in (y, expected)]
            assert place[0] == pytest.approx(place[1], abs=0.11), name


def _turned(x, y, angle):
    return math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y


def test_a_turned_disc_stays_a_disc():
    far = torch.cdist(
        torch.cartesian_prod(torch.arange(32.0), torch.arange(32.0)), torch.tensor([[15.5, 15.5]])
    ).reshape(32, 32)
    x = (3 * (8 - far)).sigmoid().expand(12, 1, 32, 32)
    y = warp(x, rotation(torch.linspace(0, 6, 12)))
    seen = far < 15  # the corners show reflections of the disc
    assert (y - x)[..., seen].abs().max() < 0.1 and (y - x)[..., seen].abs().mean() < 0.01
    assert torch.allclose(y[..., seen].sum(2), x[..., seen].sum(2), rtol=2e-3)


def test_stretching_keeps_the_area():
    x = blob(48)
    y = warp(x, scaling(one(1.4), 1 / one(1.4)))
    assert torch.allclose(y, blob(48, 0, 0, 1.4, 1 / 1.4), atol=0.01)
    assert y.sum().item() == pytest.approx(x.sum().item(), rel=1e-3)


def test_warp_and_blit_agree_about_blits():
    x = torch.cat([blob(32, 2, -3, 2.0, 1.0), blob(32, -4, 1)], 1).float().expand(4, 2, 32, 32)
    map = after(
        scaling(torch.tensor([1.0, -1, 1, -1]), torch.ones(4)),
        quarter_turns(torch.arange(4.0)),
        translation(torch.tensor([[1.0, 2]] * 4)),
    )
    assert (warp(x, map) - blit(x, map)).abs().max() < 0.03


def test_far_outside_the_image_is_its_reflection():
    x = blob(32, -11, 3, 1.5, 1.5)
    for period in (1, -4):
        assert torch.allclose(warp(x, translation(one(2 * 31.0 * period, 0.0))), x, atol=0.03)
    assert torch.allclose(warp(x, translation(one(31.0, 0.0))), x.flip(3), atol=0.03)


def test_gradients_of_first_and_second_order():
    map = after(rotation(one(0.4, 2.0).squeeze()), translation(one(0.3, 0.2).expand(2, 2)))
    x = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    for f in (
        lambda x: warp(x, map),
        lambda x: warp(x**2, map) ** 2,
        lambda x: blit(x**2, quarter_turns(one(1, 2).squeeze())) ** 2,
    ):
        assert gradcheck(f, (x,), fast_mode=True) and gradgradcheck(f, (x,), fast_mode=True)


def test_sampling_does_not_need_second_derivatives_of_grid_sample():
    grid = torch.rand(1, 4, 4, 2, dtype=torch.float64) * 2 - 1
    x = torch.randn(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    sample = geometry._Sample.apply
    (slope,) = torch.autograd.grad((sample(x, grid) ** 3).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    dense = torch.autograd.functional.jacobian(lambda x: sample(x, grid), x).reshape(16, 25)
    assert torch.allclose(bend.flatten(), dense.T @ (6 * (dense @ x.flatten()) * dense.sum(1)))
