"""DiffAugment against the official numbers, and its own draws."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2o.augment import diffaug
from d2o.augment.diffaug import diffaugment
from d2o.errors import UserError
from d2o.methods.base import Draws

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "gdd" / "diffaug.safetensors")
DRAWS = {
    "brightness": ("u_brightness",),
    "saturation": ("u_saturation",),
    "contrast": ("u_contrast",),
    "translation": ("shift_rows", "shift_columns"),
    "cutout": ("offset_rows", "offset_columns"),
}


def draws(count=64, start=0, total=64):
    return Draws(3, start, count, total, torch.device("cpu"))


def apply(x, name, of):
    return getattr(diffaug, name)(x, *(GOLDEN[f"{of}.{draw}"] for draw in DRAWS[name]))


@pytest.mark.parametrize("name", DRAWS)
def test_each_operation_is_the_official_one(name):
    torch.testing.assert_close(apply(GOLDEN["x"], name, name), GOLDEN[name], rtol=0, atol=1e-5)


def test_all_of_them_and_their_gradient():
    x = y = GOLDEN["x"].clone().requires_grad_(True)
    for name in DRAWS:
        y = apply(y, name, "all")
    torch.testing.assert_close(y, GOLDEN["all"], rtol=0, atol=1e-5)
    (y * torch.cos(torch.arange(y.numel())).view_as(y)).sum().backward()
    torch.testing.assert_close(x.grad, GOLDEN["all.grad"], rtol=0, atol=1e-5)


def test_every_sample_has_draws_of_its_own_whatever_the_division():
    x = torch.randn(64, 3, 16, 24)
    whole = diffaugment(x, draws())
    torch.testing.assert_close(diffaugment(x[24:40], draws(16, 24)), whole[24:40])
    assert not torch.allclose(whole[0] - x[0], whole[1] - x[1])
    one = x[:1].expand(64, -1, -1, -1)
    assert len({float(y.sum()) for y in diffaugment(one, draws(), ["translation"])}) > 16  # 5 x 7 shifts


def test_ranges():
    """Shifts of at most an eighth of the side; a rectangle of a fifth of it, cut off at the borders and never missed;
    brightness around none."""
    x = torch.ones(4096, 1, 16, 24)
    many = draws(4096, 0, 4096)
    shifted = diffaugment(x, many, ["translation"])[:, 0]
    for lines, most in ((shifted.amax(2), 2), (shifted.amax(1), 3)):
        lost = lines.shape[1] - lines.sum(1)
        assert lost.min() == 0 and lost.max() == most
        assert (lines[:, 0] == 0).float().mean() == pytest.approx(most / (2 * most + 1), abs=0.05)
    cut = 1 - diffaugment(x, many, ["cutout"])[:, 0]
    rows, columns = cut.amax(2).sum(1), cut.amax(1).sum(1)
    assert rows.max() == 3 and columns.max() == 5 and rows.min() == 2 and columns.min() == 3
    assert cut.amax(2).mean(0).min() > 0.1  # every row is cut out now and then, those at the border too
    lighter = diffaugment(x, many, ["color"]).mean((1, 2, 3)) - 1
    assert lighter.min() < -0.49 and lighter.max() > 0.49 and lighter.mean().abs() < 0.02


def test_colours_know_grey_images():
    x = torch.rand(8, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(diffaug.saturation(x, torch.rand(8)), x)


def test_it_can_be_differentiated_twice():
    x = torch.rand(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: diffaugment(x, draws(1, 0, 1)).square(), [x])


def test_unknown_policy():
    with pytest.raises(UserError, match="unknown policy of DiffAugment 'cutouts'"):
        diffaugment(torch.zeros(1, 3, 8, 8), draws(1), ["cutouts"])
