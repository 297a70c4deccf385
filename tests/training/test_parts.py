"""EMA, schedules, gradient policies, random numbers and batches, each against its definition."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2o.data.order import mix
from d2o.errors import UserError
from d2o.methods.base import Draws
from d2o.training.batches import open_batches
from d2o.training.due import Calendar
from d2o.training.ema import EMA
from d2o.training.optim import OPTIMIZERS, GradientGuard, clip, learning_rate
from d2o.training.player import Player
from d2o.training.precision import LossScale
from d2o.training.strategy import Replicate

CPU = torch.device("cpu")


def options(**more):
    values = {
        "state": "fp32",
        "name": "adam",
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "no_decay": (),
        "decays": {},
        "schedule": "constant",
        "warmup": 0,
        "final_lr": 0.0,
        "clip_norm": None,
        "clip_value": None,
    }
    return SimpleNamespace(**{**values, **more})


def test_ema_half_life_is_one():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net, half_life=1000, ramp=None)
    nn.init.ones_(net.weight)
    for i in range(10):
        ema.update(net, i * 100, 100)
    assert ema.network.weight.item() == pytest.approx(0.5, abs=1e-6)


def test_ema_first_update_with_ramp_copies_and_constant_decay_does_not():
    net = nn.Linear(2, 2)
    ramped, constant = EMA(net, half_life=1000), EMA(net, decay=0.9)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
    ramped.update(net, 0, 10)
    constant.update(net, 0, 10)
    assert torch.allclose(ramped.network.weight, net.weight)
    assert torch.allclose(constant.network.weight, before + 0.1)


def test_ema_without_settings_follows_and_copies_buffers():
    net = nn.BatchNorm1d(3)
    ema = EMA(net)
    with torch.no_grad():
        net.weight += 1
        net.running_mean += 2
    ema.update(net, 0, 1)
    assert torch.equal(ema.network.weight, net.weight) and torch.equal(ema.network.running_mean, net.running_mean)


def test_ema_with_a_start_follows_until_then():
    net = nn.Linear(1, 1, bias=False)
    ema = EMA(net, decay=0.9, start=20)
    for images, expected in ((0, 1.0), (10, 2.0), (20, 2.1)):
        with torch.no_grad():
            net.weight.fill_(images / 10 + 1)
        ema.update(net, images, 10)
        assert ema.network.weight.item() == pytest.approx(expected)


def test_what_is_due():
    every = SimpleNamespace(every=25)
    recipe = SimpleNamespace(batch=10, images=95, log_every=4, preview=None, eval=every, checkpoint=every)
    schedule = Calendar(recipe)
    due = [schedule.after(i) for i in range(1, 11)]
    assert (
        [i for i, d in enumerate(due, 1) if d.eval]
        == [3, 5, 8, 10]
        == [i for i, d in enumerate(due, 1) if d.checkpoint]
    )
    assert [i for i, d in enumerate(due, 1) if d.line] == [4, 8, 10]
    assert [d.last for d in due] == [False] * 9 + [True] and not any(d.preview or d.stop for d in due)
    assert (schedule.iterations, schedule.images(9), schedule.images(10)) == (10, 90, 95)


def test_learning_rates():
    o = options(lr=1.0, warmup=10, schedule="cosine", final_lr=0.1)
    assert learning_rate(o, 0, 110) == pytest.approx(0.1)
    assert learning_rate(o, 10, 110) == pytest.approx(1.0)
    assert learning_rate(o, 60, 110) == pytest.approx(0.55)
    assert learning_rate(o, 110, 110) == pytest.approx(0.1)
    assert learning_rate(options(lr=1.0, schedule="linear"), 25, 100) == pytest.approx(0.75)
    assert learning_rate(options(lr=1.0), 99, 100) == 1.0


def player(network, **settings):
    return Player("net", network, options(**settings), Replicate(CPU, 1))


def train(trained, steps):
    for i in range(steps):
        (trained.network(torch.ones(1, 3)) - 1).square().sum().backward()
        trained.update(i, 0.01, LossScale("fp32"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss_and_survives_packing(name):
    torch.manual_seed(0)
    a = player(nn.Linear(3, 2), name=name, weight_decay=0.001)
    start = (a.network(torch.ones(1, 3)) - 1).square().sum().item()
    train(a, 7)
    moments = {key: value.clone() for key, value in a.moments().items()}
    numbered = {key.replace("weight", "0").replace("bias", "1"): value for key, value in moments.items()}
    others = []
    for saved in (moments, numbered):  # as an older d2o wrote them
        b = player(copy.deepcopy(a.network), name=name, weight_decay=0.001)
        b.load_moments({key: value.clone() for key, value in saved.items()})
        train(b, 20)
        others.append(b)
    train(a, 20)
    for b in others:
        assert all(map(torch.equal, a.network.parameters(), b.network.parameters()))
    assert (a.network(torch.ones(1, 3)) - 1).square().sum().item() < start


def test_weight_decay_leaves_named_parameters_alone():
    network = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    spared = player(network, name="adamw", weight_decay=0.5, no_decay=("*bias", "1.*"))
    train(spared, 1)
    assert [g["weight_decay"] for g in spared.optimizer.param_groups] == [0.5, 0.0]
    assert [len(g["params"]) for g in spared.optimizer.param_groups] == [1, 3]
    again = player(copy.deepcopy(network), name="adamw", weight_decay=0.5)
    again.load_moments(spared.moments())  # by name, whatever the groups
    assert again.moments().keys() == spared.moments().keys()
    grouped = player(network, name="adamw", weight_decay=0.5, no_decay=("*bias",), decays={"0.*": 0.1, "*": 0.2})
    assert [(g["weight_decay"], len(g["params"])) for g in grouped.optimizer.param_groups] == [
        (0, 2),
        (0.1, 1),
        (0.2, 1),
    ]
    with pytest.raises(UserError, match=r"optim.decays: '\*norm\*' fits no parameter"):
        player(nn.Linear(3, 2), decays={"*norm*": 0.1})
    with pytest.raises(UserError, match=r"optim.no_decay: '\*norm\*' fits no parameter"):
        player(nn.Linear(3, 2), no_decay=("*norm*",))


def test_clipping():
    gradient = torch.tensor([3.0, 4.0])
    clip([gradient], options(clip_norm=1.0))
    assert torch.allclose(gradient, torch.tensor([0.6, 0.8]), atol=1e-4)
    clip([gradient], options(clip_value=0.7))
    assert torch.allclose(gradient, torch.tensor([0.6, 0.7]), atol=1e-4)


def test_bad_gradients_are_refused_skipped_or_zeroed_and_counted():
    bad, good = [torch.tensor([1.0, float("nan"), float("inf")])], [torch.ones(3)]
    guard = GradientGuard("raise", CPU)
    assert guard.admit(good, 0) and guard.admit([bad[0].clone()], 7) and guard.admit([bad[0].clone()], 9)
    with pytest.raises(UserError, match=r"'student' are not finite \(first at iteration 7\)"):
        guard.check("student")
    guard = GradientGuard("skip", CPU)
    assert guard.admit(good, 0) and not guard.admit([bad[0].clone()], 1) and guard.check("x") == 1
    guard = GradientGuard("zero", CPU)
    mended = bad[0].clone()
    assert guard.admit([mended], 0) and guard.check("x") == 1
    assert mended.tolist() == [1.0, 0.0, 1e5]


def test_draws_do_not_depend_on_the_split():
    whole = Draws(5, 0, 8, 8, CPU)
    a, b = Draws(5, 0, 3, 8, CPU), Draws(5, 3, 5, 8, CPU)
    for call in (lambda d: d.randn(2, 2), lambda d: d.rand(), lambda d: d.randint(0, 100, 3)):
        assert torch.equal(call(whole), torch.cat([call(a), call(b)]))


class Source:
    """Stands for a set of images."""

    labels = None

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def images(self, index):
        return index[:, None, None, None].to(torch.uint8).expand(-1, 1, 2, 2)


def seen(batches, iterations):
    return [((batches.get(i).images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for i in iterations]


def test_batches_visit_everything_once_an_epoch_and_are_a_function_of_the_iteration():
    batches = open_batches(Source(10), 4, 0, (0, 4), CPU)
    first = seen(batches, range(10))
    batches.close()
    flat = [i for batch in first for i in batch]
    for epoch in range(4):
        assert sorted(flat[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    again = open_batches(Source(10), 4, 0, (0, 4), CPU)
    assert seen(again, [7, 3, 9]) == [first[7], first[3], first[9]]
    halves = [seen(open_batches(Source(10), 4, 0, share, CPU), [5])[0] for share in ((0, 2), (2, 4))]
    assert halves[0] + halves[1] == first[5]
    assert seen(open_batches(Source(10), 4, 1, (0, 4), CPU), range(10)) != first


def test_batches_can_be_bound_to_some_images_and_flipped():
    only = open_batches(Source(10), 4, 0, (0, 4), CPU, indices=torch.tensor([2, 3, 5]))
    assert {i for batch in seen(only, range(6)) for i in batch} == {2, 3, 5}

    class Sided(Source):
        def images(self, index):
            x = torch.zeros(len(index), 1, 1, 2, dtype=torch.uint8)
            x[..., 1] = 255
            return x

    flipped = open_batches(Sided(50), 50, 0, (0, 50), CPU, xflip=True).get(0).images[:, 0, 0, 0]
    assert 10 < int((flipped > 0).sum()) < 40


def test_mix_is_stable_and_spreads():
    assert mix(0, "a") == mix(0, "a") != mix(0, "b")
    assert len({mix(0, "draws", i) for i in range(1000)}) == 1000
