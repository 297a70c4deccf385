import math

import torch

from d2o.augment.color import color_map, recolor

NEUTRAL = {"brightness": 0.0, "contrast": 1.0, "luma_flip": 0.0, "hue": 0.0, "saturation": 1.0}


def recolored(x, **strengths):
    values = {k: torch.full((len(x),), v) for k, v in (NEUTRAL | strengths).items()}
    return recolor(x, *color_map(**values))


def images(channels=3):
    return torch.rand(4, channels, 6, 6) * 2 - 1


def luma(x):
    return x.mean(1)


def chroma(x):
    return (x - x.mean(1, keepdim=True)).norm(dim=1)


def test_neutral_strengths_change_no_bit():
    for x in (images(3), images(1)):
        assert torch.equal(recolored(x), x)


def test_brightness_then_contrast():
    for x in (images(3), images(1)):
        assert torch.allclose(recolored(x, brightness=0.3, contrast=2.0), 2 * (x + 0.3), atol=1e-6)


def test_luma_flip_keeps_the_chroma_and_is_its_own_inverse():
    x = images()
    y = recolored(x, luma_flip=1.0)
    assert torch.allclose(luma(y), -luma(x), atol=1e-6)
    assert torch.allclose(y - luma(y)[:, None], x - luma(x)[:, None], atol=1e-6)
    assert torch.allclose(recolored(y, luma_flip=1.0), x, atol=1e-6)


def test_hue_keeps_luma_and_chroma_and_moves_colours_round():
    x = images()
    y = recolored(x, hue=0.9)
    assert torch.allclose(luma(y), luma(x), atol=1e-6) and torch.allclose(chroma(y), chroma(x), atol=1e-6)
    assert not torch.allclose(y, x, atol=0.1)
    assert torch.allclose(recolored(y, hue=-0.9), x, atol=1e-6)
    third = recolored(x, hue=2 * math.pi / 3)  # red becomes green, green blue, blue red
    assert torch.allclose(third, x.roll(1, 1), atol=1e-6)


def test_saturation_scales_the_chroma_alone():
    x = images()
    for s in (0.0, 0.5, 3.0):
        y = recolored(x, saturation=s)
        assert torch.allclose(luma(y), luma(x), atol=1e-6) and torch.allclose(chroma(y), s * chroma(x), atol=1e-5)


def test_grey_images_are_rgb_images_with_equal_channels():
    x = images(1)
    assert torch.allclose(recolored(x, hue=1.0, saturation=3.0), x, atol=1e-6)
    assert torch.allclose(recolored(x, luma_flip=1.0), -x, atol=1e-6)
    some = {"brightness": 0.2, "contrast": 1.7, "luma_flip": 1.0, "hue": -2.0, "saturation": 0.4}
    assert torch.allclose(
        recolored(x, **some).expand(-1, 3, -1, -1), recolored(x.expand(-1, 3, -1, -1), **some), atol=1e-6
    )
