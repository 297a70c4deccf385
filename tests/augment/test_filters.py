import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2o.augment import filters


@pytest.mark.parametrize("h", [filters.SYM2, filters.SYM6], ids=["sym2", "sym6"])
def test_wavelets_are_orthonormal_with_as_many_vanishing_moments_as_their_names_say(h):
    assert h.sum() == pytest.approx(np.sqrt(2))
    for k in range(len(h) // 2):
        assert (h[: len(h) - 2 * k] * h[2 * k :]).sum() == pytest.approx(float(k == 0), abs=1e-11)
    n, signs = np.arange(len(h)), (-1.0) ** np.arange(len(h))
    moments = [(signs * n**k * h).sum() for k in range(len(h) // 2 + 1)]
    assert np.abs(moments[:-1]).max() < 1e-8 and abs(moments[-1]) > 1


def test_sym6_is_the_least_asymmetric():
    """All filters with these relations come from the roots of one polynomial (Daubechies 1988, section 4), one of each
    pair (z, 1/z) being taken; sym6 is the one of them whose phase is nearest to a straight line."""
    roots = np.roots(
        [math.comb(5 + k, k) for k in range(6)][::-1]
    )  # in (2 - z - 1/z) / 4: three real ones or conjugate pairs
    groups = [[r for r in roots if abs(r.conjugate() - q) < 1e-6 or r == q] for q in roots if q.imag >= -1e-9]
    found = []
    for choice in itertools.product((0, 1), repeat=len(groups)):
        zeros = [sorted(np.roots([1, 4 * r - 2, 1]), key=abs)[c] for c, group in zip(choice, groups) for r in group]
        h = np.real(np.poly([*zeros, *[-1] * 6]))
        omega = np.linspace(0.01, 2, 100)
        phase = np.unwrap(np.angle(np.exp(-1j * np.outer(omega, np.arange(12))) @ h))
        bend = np.abs(phase - np.polyval(np.polyfit(omega, phase, 1), omega)).max()
        h *= math.sqrt(2) / h.sum()
        found.append((bend, min(np.abs(filters.SYM6 - h).max(), np.abs(filters.SYM6 - h[::-1]).max())))
    assert len(found) == 8 and min(found)[1] < 1e-10
    assert sum(error < 1e-10 for _, error in found) == 2  # it and its mirror image


@pytest.mark.parametrize("size", [4, 8, 33])
def test_resampling_keeps_constants_and_down_undoes_up(size):
    like = torch.zeros(0, dtype=torch.float64)
    up, down = filters.matrix("up", size, like), filters.matrix("down", size, like)
    assert torch.allclose(up.sum(1), torch.ones(2 * size + 10, dtype=torch.float64))
    assert torch.allclose(down.sum(1), torch.ones(size, dtype=torch.float64))
    assert torch.allclose(down @ up, torch.eye(size, dtype=torch.float64), atol=1e-10)


def test_positions_are_reflected_about_the_edge_pixels_again_and_again():
    x = torch.tensor([-9.0, -3.5, -1.0, 0.0, 2.25, 4.0, 5.0, 8.0, 9.0])
    assert filters.reflected(x, 5).tolist() == [1.0, 3.5, 1.0, 0.0, 2.25, 4.0, 3.0, 0.0, 1.0]


def test_matrices_continue_the_image_in_the_same_way():
    image = torch.randn(1, 1, 30, 30, dtype=torch.float64)
    wide = F.pad(image, (21, 21, 21, 21), mode="reflect")
    gains = torch.tensor([[0.5, 2.0, 1.5, 0.7]], dtype=torch.float64)
    taps = torch.from_numpy(sum(g * f for g, f in zip(gains[0].tolist(), filters.band_filters())))
    assert torch.allclose(filters.amplify(image, gains), F.conv2d(wide, torch.outer(taps, taps)[None, None]))


def test_bands_add_up_to_the_identity_and_lie_where_they_should():
    bands = filters.band_filters()
    assert np.allclose(sum(bands), np.eye(43)[21])
    assert all(np.allclose(b, b[::-1]) for b in bands)
    omega = np.linspace(0, np.pi, 400)
    response = np.stack([np.cos(np.outer(omega, np.arange(43) - 21)) @ b for b in bands])
    edges = [0, np.pi / 8, np.pi / 4, np.pi / 2, np.pi]
    for i in range(4):
        middle = (edges[i] + edges[i + 1]) / 2 if i else 0
        assert response[:, np.abs(omega - middle).argmin()].argmax() == i
    assert np.allclose(response[:, 0], [1, 0, 0, 0]) and np.allclose(response[:, -1], [0, 0, 0, 1])
    assert response.min() > -1e-12 and response.max() < 1 + 1e-12


def test_amplification_acts_on_its_band_along_both_axes():
    n = torch.arange(64, dtype=torch.float64)
    slow, fast = torch.ones(64, dtype=torch.float64), torch.cos(torch.pi * n)
    gains = torch.tensor([[2.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    for rows, columns, expected in ((slow, slow, 4), (slow, fast, 6), (fast, fast, 9)):
        image = torch.outer(rows, columns)[None, None]
        assert torch.allclose(filters.amplify(image, gains), expected * image)
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(filters.amplify(image, torch.ones(2, 4)), image)
    impulse = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    impulse[..., 32, 32] = 1
    taps = torch.from_numpy(sum(g * f for g, f in zip(gains[0].tolist(), filters.band_filters())))
    assert torch.allclose(filters.amplify(impulse, gains)[0, 0, 11:54, 11:54], torch.outer(taps, taps))
