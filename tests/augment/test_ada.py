import math
from dataclasses import fields, replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from d2o.augment.ada import PIPES, AdaController, AdaPipeline, Strengths, at_percentile, numbers, p_rotation, sample
from d2o.errors import UserError
from d2o.methods.base import Draws


def drawn(batch, seed=0):
    return numbers(batch, torch.Generator().manual_seed(seed))


def images(batch=4, channels=3, size=16):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("categories", PIPES)
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 8), (3, 17)])
def test_every_pipe_on_every_image(categories, channels, size):
    x, pipe = images(4, channels, size), AdaPipeline(categories)
    for p in (0.0, torch.tensor(0.0)):
        assert torch.equal(pipe(x, p, *drawn(4)), x)  # to the bit
    y = pipe(x, torch.tensor(1.0), *drawn(4))
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert all(not torch.equal(a, b) for a, b in zip(y, x))
    assert torch.equal(y, pipe(x, 1.0, *drawn(4)))  # same generator, same result


def test_an_image_of_64_pixels():
    assert AdaPipeline("bgcfnc")(images(2, 3, 64), 1.0, *drawn(2)).isfinite().all()


@pytest.mark.parametrize("kind", ["blit", "geom", "color", "filter", "noise", "cutout"])
def test_a_strength_of_another_kind_does_nothing(kind):
    s, neutral = sample(1.0, *drawn(64), (kind,)), Strengths.neutral(64)
    done = {f.name for f in fields(Strengths) if not torch.equal(getattr(s, f.name), getattr(neutral, f.name))}
    mine = {
        "blit": {"flip", "turns", "shift"},
        "geom": {"scale", "before", "stretch", "behind", "move"},
        "color": {"brightness", "contrast", "luma_flip", "hue", "saturation"},
        "filter": {"bands"},
        "noise": {"noise"},
        "cutout": {"cut"},
    }[kind]
    assert done - {"centre"} == mine


N = 40_000


def moments(x):
    return x.mean().item(), x.std().item()


def test_distributions_at_p_1():
    s = sample(torch.tensor(1.0), *drawn(N))
    near = {"abs": 0.02, "rel": 0.02}
    assert s.flip.mean().item() == pytest.approx(0.5, abs=0.01) and s.luma_flip.mean().item() == pytest.approx(
        0.5, abs=0.01
    )
    assert torch.bincount(s.turns.long(), minlength=4).div(N).tolist() == pytest.approx([0.25] * 4, abs=0.01)
    assert s.shift.abs().max() <= 0.125 and moments(s.shift) == pytest.approx((0, 0.25 / math.sqrt(12)), abs=0.002)
    for factor, std in ((s.scale, 0.2), (s.stretch, 0.2), (s.contrast, 0.5), (s.saturation, 1.0)):
        assert moments(factor.log2()) == pytest.approx((0, std), **near)
    for angle in (s.before, s.behind, s.hue):
        assert angle.abs().max() <= math.pi + 1e-6 and moments(angle) == pytest.approx(
            (0, math.pi / math.sqrt(3)), abs=0.03
        )
    assert moments(s.move) == pytest.approx((0, 0.125), abs=0.002) and moments(s.brightness) == pytest.approx(
        (0, 0.2), abs=0.004
    )
    assert s.noise.min() >= 0 and s.noise.square().mean().sqrt().item() == pytest.approx(0.1, abs=0.002)
    assert s.noise.mean().item() == pytest.approx(0.1 * math.sqrt(2 / math.pi), abs=0.002)
    assert torch.equal(s.cut, torch.ones(N)) and moments(s.centre) == pytest.approx((0.5, 1 / math.sqrt(12)), abs=0.005)
    both = torch.stack(
        [
            s.scale.log2(),
            s.stretch.log2(),
            s.before,
            s.behind,
            s.hue,
            *s.move.T,
            *s.shift.T,
            s.brightness,
            s.contrast.log2(),
            s.noise,
        ]
    )
    assert (torch.corrcoef(both) - torch.eye(len(both))).abs().max() < 0.03  # independent of each other


def test_band_gains_keep_the_power_of_a_natural_image():
    """One band's factor is 2^N(0, 1), all four then being scaled to keep 10 g_1^2 + g_2^2 + g_3^2 + g_4^2 = 13."""
    s = sample(torch.tensor(1e-3), *drawn(400_000), ("filter",)).bands
    once = s[((s != 1).any(1))]
    assert 0.003 < len(once) / 400_000 < 0.005  # four chances of 0.001
    power = (once.square() * torch.tensor([10.0, 1, 1, 1])).sum(1)
    single = power[(power - 13).abs() < 1e-3]
    assert len(single) > 0.98 * len(once)
    ratio = torch.stack([row.sort().values[[0, 3]] for row in once]).log2()
    assert (ratio[:, 1] - ratio[:, 0]).square().mean().sqrt().item() == pytest.approx(1, abs=0.06)


def test_each_transform_happens_with_probability_p():
    p = 0.3
    s = sample(torch.tensor(p), *drawn(N))
    for changed, expected in (
        (s.flip != 0, p / 2),
        (s.turns != 0, p * 3 / 4),
        ((s.shift != 0).any(1), p),
        (s.scale != 1, p),
        (s.stretch != 1, p),
        (s.before != 0, p_rotation(torch.tensor(p)).item()),
        ((s.before != 0) | (s.behind != 0), p),
        ((s.move != 0).any(1), p),
        (s.brightness != 0, p),
        (s.contrast != 1, p),
        (s.luma_flip != 0, p / 2),
        (s.hue != 0, p),
        (s.saturation != 1, p),
        ((s.bands != 1).any(1), 1 - (1 - p) ** 4),
        (s.noise != 0, p),
        (s.cut != 0, p),
    ):
        assert changed.float().mean().item() == pytest.approx(expected, abs=0.01)
    assert p_rotation(torch.tensor(0.5)).item() == pytest.approx(0.2929, abs=1e-4)
    assert p_rotation(torch.tensor(1.0)).item() == 1 and p_rotation(torch.tensor(0.0)).item() == 0


def test_images_without_a_transform_stay_as_they_are_beside_others():
    x, pipe = images(256, 3, 8), AdaPipeline("bgcfnc")
    y = pipe(x, torch.tensor(0.1), *drawn(256))
    s = sample(0.1, *drawn(256))
    neutral = Strengths.neutral(256)
    untouched = torch.stack(
        [
            (getattr(s, f.name) == getattr(neutral, f.name)).flatten(1).all(1)
            if getattr(s, f.name).ndim > 1
            else getattr(s, f.name) == getattr(neutral, f.name)
            for f in fields(s)
            if f.name != "centre"
        ]
    ).all(0)
    assert 10 < untouched.sum() < 100
    assert torch.equal(y[untouched], x[untouched])


def test_chosen_transforms():
    x, none = images(2), Strengths.neutral(2)
    pipe = AdaPipeline("bgcfnc")
    assert torch.equal(pipe.transform(x, none), x)
    assert torch.equal(
        pipe.transform(x, replace(none, flip=torch.tensor([1.0, 0.0]))), torch.stack([x[0].flip(2), x[1]])
    )
    assert torch.equal(pipe.transform(x, replace(none, shift=torch.full((2, 2), 0.125)))[..., 2:, 2:], x[..., :-2, :-2])
    half = pipe.transform(x, replace(none, before=torch.full((2,), math.pi)))
    assert (half - x.rot90(2, (2, 3)))[..., 2:-2, 2:-2].abs().mean() < 0.2
    cut = pipe.transform(x, replace(none, cut=torch.ones(2), centre=torch.tensor([[0.5, 0.5], [0.0, 1.0]])))
    assert (cut[0, :, 4:12, 4:12] == 0).all() and (cut[0] == 0).sum() == 3 * 64
    assert (cut[1, :, 12:, :4] == 0).all() and (cut[1] == 0).sum() == 3 * 16
    field = torch.randn(2, 3, 16, 16)
    assert torch.allclose(
        pipe.transform(x, replace(none, noise=torch.tensor([0.0, 0.5])), field),
        torch.stack([x[0], x[1] + 0.5 * field[1]]),
    )


def test_percentiles():
    low, middle, high = (at_percentile(q, 3) for q in (0.1, 0.5, 0.9))
    for name in ("scale", "brightness", "contrast", "saturation", "hue", "noise", "before", "stretch"):
        a, b, c = (getattr(s, name) for s in (low, middle, high))
        assert (a < b).all() and (b < c).all(), name
    assert torch.allclose(middle.scale, torch.ones(3)) and torch.allclose(
        high.scale, torch.tensor(2 ** (0.2 * 1.281552))
    )
    assert torch.allclose(high.noise, torch.tensor(0.1 * 1.644854), atol=1e-5)
    with pytest.raises(UserError):
        at_percentile(1.0, 3)


@pytest.mark.parametrize("categories", ["bgc", "bgcfnc"])
def test_neither_micro_batches_nor_processes_change_the_result(categories):
    x, pipe, p = images(6), AdaPipeline(categories), torch.tensor(0.8)
    whole = Draws(3, 0, 6, 6, torch.device("cpu"))
    parts = [Draws(3, start, 2, 6, torch.device("cpu")) for start in (0, 2, 4)]
    expected = pipe(x, p, whole.randn, whole.rand)
    actual = torch.cat([pipe(x[2 * i : 2 * i + 2], p, d.randn, d.rand) for i, d in enumerate(parts)])
    assert torch.allclose(actual, expected, atol=1e-5)


def test_blits_are_the_same_with_more_kinds():
    a, b = sample(0.7, *drawn(50), ("blit",)), sample(0.7, *drawn(50))
    assert torch.equal(a.flip, b.flip) and torch.equal(a.turns, b.turns) and torch.equal(a.shift, b.shift)


def test_gradients_of_first_and_second_order():
    pipe, p = AdaPipeline("bgcfnc"), torch.tensor(0.7)
    x = images(2, 3, 4).double().requires_grad_()
    f = lambda x: pipe(torch.tanh(x), p, *drawn(2)) ** 2  # noqa: E731
    assert gradcheck(f, (x,), fast_mode=True) and gradgradcheck(f, (x,), fast_mode=True)


def test_gradient_penalty_through_the_pipeline_reaches_the_discriminator():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 1)
    )
    x = images(4, 3, 8).requires_grad_()
    (slope,) = torch.autograd.grad(net(AdaPipeline("bgc")(x, torch.tensor(0.9), *drawn(4))).sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert all(w.grad.abs().sum() > 0 for w in (net[0].weight, net[3].weight))


def test_autocast_does_not_coarsen_the_images():
    x, pipe = images(8), AdaPipeline("bgcfnc")
    expected = pipe(x, 0.9, *drawn(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pipe(x, 0.9, *drawn(8)), expected)
        half = pipe(x.bfloat16(), 0.9, *drawn(8))
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.2)


def test_inference_first_and_training_later_with_the_same_matrices():
    pipe, x = AdaPipeline("bgcf"), images(2, 3, 10)
    with torch.inference_mode():
        pipe(x, 1.0, *drawn(2))
    x = x.clone().requires_grad_()
    pipe(x, 1.0, *drawn(2)).sum().backward()
    assert x.grad.isfinite().all()


def test_meta_images():
    empty = lambda *shape: torch.empty(2, *shape, device="meta")  # noqa: E731
    x = empty(3, 32, 32).requires_grad_()
    controller = AdaController(64)
    y = AdaPipeline("bgcfnc")(x, controller.p, empty, empty)
    assert y.shape == x.shape
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.autograd.grad(slope.square().sum(), x)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="bcg"):
        AdaPipeline("bcg")
    for shape in ((2, 3, 8, 9), (2, 3, 2, 2), (3, 8, 8)):
        with pytest.raises(UserError, match="square"):
            AdaPipeline("b")(torch.zeros(shape), 0.0, *drawn(2))
    with pytest.raises(UserError, match="channels"):
        AdaPipeline("bgc")(torch.zeros(2, 4, 8, 8), 0.0, *drawn(2))
    assert AdaPipeline("bg")(torch.zeros(2, 4, 8, 8), 1.0, *drawn(2)).shape == (2, 4, 8, 8)
    for wrong in ({"batch": 0}, {"interval": 0}, {"kimg": 0}, {"p0": 1.5}, {"fixed": -0.1}, {"target": 2}):
        with pytest.raises(UserError):
            AdaController(**({"batch": 64} | wrong))


def test_controller_moves_by_the_images_seen():
    c = AdaController(64)
    for _ in range(3):
        c.update(torch.tensor(1.0))
    assert c.p == 0
    c.update(torch.tensor(1.0))
    assert c.p.item() == pytest.approx(5.12e-4) and c.r == 1  # 4 * 64 / 500,000
    for sign in (0.5, 0.5, 0.5, 0.5):
        c.update(torch.tensor(sign))
    assert c.p.item() == pytest.approx(0, abs=1e-9) and c.r == 0.5
    for _ in range(4):
        c.update(torch.tensor(-1.0))
    assert c.p == 0  # not below


def test_controller_uses_the_mean_over_the_interval_and_stops_at_1():
    c = AdaController(100, interval=2, kimg=1, p0=0.5)
    for signs, p in (
        ((1.0, 0.1), 0.3),
        ((1.0, 0.3), 0.5),
        ((1.0, 1.0), 0.7),
        ((1.0, 1.0), 0.9),
        ((1.0, 1.0), 1.0),
        ((0.6, 0.6), 1.0),
    ):
        before = c.p
        kept = before.clone()
        for sign in signs:
            c.update(torch.tensor(sign))
        assert c.p.item() == pytest.approx(p) and torch.equal(before, kept)
    assert c.p.item() == 1


def test_controller_resumes_in_the_middle_of_an_interval_and_can_be_fixed():
    a, b = AdaController(64), AdaController(64)
    for _ in range(6):
        a.update(torch.tensor(0.9))
    b.load_state_dict(a.state_dict())
    for c in (a, b):
        for _ in range(2):
            c.update(torch.tensor(0.9))
    assert torch.equal(a.p, b.p) and a.p.item() == pytest.approx(2 * 5.12e-4)
    fixed = AdaController(64, fixed=0.25)
    for _ in range(8):
        fixed.update(torch.tensor(1.0))
    assert fixed.p == 0.25 and fixed.r == 1
