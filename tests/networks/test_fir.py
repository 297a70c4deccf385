import itertools

import pytest
import torch
from torch.nn import functional as F

from d2o.errors import UserError
from d2o.networks.fir import EDGES, down2, fir_taps, resample, smooth, up2

SHORT, LOPSIDED, LONG = (
    (1, 3, 3, 1),
    (1, 2, 5, 3),
    (1, 3, 7, 8, 4, 1.5, 0.5),
)  # even and odd ones of LONG have the same sum


def by_definition(x, taps, up, down, pad):
    """Zeros inserted, padded or cropped, dense convolution with the mirrored outer product, samples dropped."""
    b, c, h, w = x.shape
    z = x.new_zeros(b, c, h * up, w * up)
    z[:, :, ::up, ::up] = x
    z = F.pad(z, pad).flatten(0, 1)[:, None]
    kernel = taps.outer(taps).flip(0, 1)[None, None] * up**2
    return F.conv2d(z, kernel).unflatten(0, (b, c))[:, :, 0, ::down, ::down]


@pytest.mark.parametrize("taps", [SHORT, LOPSIDED, LONG, (1, 2)])
def test_equals_its_definition(taps):
    torch.manual_seed(0)
    x, k = torch.randn(2, 3, 9, 8), fir_taps(taps)
    for up, down, pad in itertools.product(
        (1, 2, 3), (1, 2), ((0, 1, 2, 3), (3, 3, 3, 3), (5, 9, 0, -1), (-1, 2, 9, 9))
    ):
        expected = by_definition(x, k, up, down, pad)
        assert torch.allclose(resample(x, k, up, down, pad), expected, atol=1e-5)
        assert torch.allclose(resample(x, k.expand(3, -1), up, down, pad), expected, atol=1e-5)


def test_each_channel_may_have_its_own_filter():
    x, k, m = torch.randn(2, 2, 8, 8), fir_taps(LOPSIDED), fir_taps((0, 1, 0, 0))
    y = resample(x, torch.stack([k, m]), up=2)
    assert torch.allclose(y[:, :1], resample(x[:, :1], k, up=2), atol=1e-6)
    assert torch.allclose(y[:, 1:], resample(x[:, 1:], m, up=2), atol=1e-6)


@pytest.mark.parametrize("taps", [SHORT, LONG])
def test_a_constant_image_stays_constant(taps):
    k, x = fir_taps(taps), torch.full((1, 2, 16, 16), 0.7)
    for edge, (up, down) in itertools.product(EDGES, ((1, 1), (2, 1), (1, 2))):
        y = resample(x, k, up, down, edge=edge)
        assert y.shape[2:] == (16 * up // down, 16 * up // down)
        inside = y if edge != "zeros" else y[:, :, 6:-6, 6:-6] if down == 1 else y[:, :, 3:-3, 3:-3]
        assert torch.allclose(inside, torch.full_like(inside, 0.7), atol=1e-6), (edge, up, down)


def test_with_zeros_outside_a_constant_fades_at_the_border():
    k = fir_taps()
    line = up2(torch.ones(1, 1, 8, 8), k)[0, 0, 8]
    assert torch.allclose(line, torch.tensor([0.75] + [1.0] * 14 + [0.75]))


def test_up_is_the_adjoint_of_down():
    x, y, k = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 16, 16), fir_taps()
    assert torch.allclose((up2(x, k) * y).sum() / 4, (x * down2(y, k)).sum(), atol=1e-4)


def test_smooth_has_the_size_that_its_padding_gives():
    assert smooth(torch.ones(1, 1, 9, 9), fir_taps(), 1).shape == (1, 1, 8, 8)
    assert smooth(torch.ones(1, 1, 9, 9), fir_taps(), 0, gain=4.0)[0, 0, 0, 0].item() == pytest.approx(4)


def test_unknown_edge():
    with pytest.raises(UserError, match="edge of an image 'zero'.*'zeros'"):
        up2(torch.ones(1, 1, 8, 8), fir_taps(), "zero")


@pytest.mark.parametrize("taps", [SHORT, LONG])
@pytest.mark.parametrize("up, down, edge", [(2, 1, "zeros"), (1, 2, "reflect"), (1, 1, "replicate")])
def test_twice_differentiable(taps, up, down, edge):
    k = fir_taps(taps)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    # The square makes the second derivative of a linear map something else than zero.
    assert torch.autograd.gradgradcheck(lambda x: resample(x, k, up, down, edge=edge).square().sum(1), (x,))
