"""Moments in eight bits."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from d2o.errors import UserError
from d2o.recipes.load import load_recipe
from d2o.training import eight_bit
from d2o.training.optim_section import OptimSection
from d2o.training.player import Player
from d2o.training.precision import LossScale
from d2o.training.strategy import Replicate

CPU = torch.device("cpu")


def player(state, name="adamw"):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    options = OptimSection(name=name, lr=0.01, state=state, weight_decay=0.01)
    return Player("student", network, options, Replicate(CPU, 1))


def train(player, steps, first=0):
    """A quadratic with noise in its gradients."""
    losses = []
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(32, 64, generator=generator)
        loss = (player.network(x) - x[:, :3]).square().mean()
        loss.backward()
        player.update(i, 0.01, LossScale("fp32"))
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_it_goes_where_adam_goes(name):
    pytest.importorskip("torchao")
    exact, rounded = player("fp32", name), player("8bit", name)
    a, b = train(exact, 60), train(rounded, 60)
    assert a[-1] < a[0] / 5 and b[-1] == pytest.approx(a[-1], rel=0.2)
    moved = [(p - q).norm() / p.norm() for p, q in zip(exact.network.parameters(), rounded.network.parameters())]
    assert max(moved) < 0.05
    big, small = (rounded.optimizer.state[rounded.network[i].weight] for i in (0, 1))
    assert big["exp_avg"].codes.dtype == torch.uint8 and small["exp_avg"].dtype == torch.float32
    held = sum(t.numel() * t.element_size() for t in eight_bit.taken_apart(big).values())
    assert held == 2 * eight_bit.bytes_of(4096) + 4 and eight_bit.bytes_of(4096) == 4096 + 64
    assert eight_bit.bytes_of(192) == 4 * 192 and eight_bit.bytes_of(4097) == 4 * 4097


def test_saved_moments_go_on_with_the_same_bits():
    pytest.importorskip("torchao")
    whole, first = player("8bit"), player("8bit")
    train(whole, 6)
    train(first, 3)
    saved = {key: value.clone() for key, value in first.moments().items()}
    assert saved["0.weight/exp_avg.codes"].dtype == torch.uint8 and saved["1.bias/exp_avg"].dtype == torch.float32
    second = player("8bit")
    second.network.load_state_dict(first.network.state_dict())
    second.load_moments(saved)
    train(second, 3, first=3)
    assert all(map(torch.equal, second.network.parameters(), whole.network.parameters()))
    saved["0.weight/exp_avg.scale"] = torch.zeros(3)
    with pytest.raises(LookupError, match="has the shape"):
        player("8bit").load_moments(saved)


def test_it_is_adam_s():
    with pytest.raises(UserError, match="8bit is for adam and adamw, not sgd"):
        load_recipe("quickstart", ["optim.name=sgd", "optim.state=8bit"])


def test_without_the_package_it_is_refused(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match="needs the package torchao") as error:
        player("8bit")
    assert "d2o[8bit]" in error.value.hint
