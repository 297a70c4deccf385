"""Convolutions of frozen networks: torch's numbers, without what nobody needs."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from d2o.features.common import package
from d2o.networks.frozen_conv import FrozenConv2d, hold_convolutions


def of_kind(kind):
    """A convolution with a fixed weight, and what takes a convolution's place."""
    torch.manual_seed(0)
    if kind.startswith("same"):
        same = package("timm").layers.Conv2dSame
        conv = same(4, 4, 3 if kind == "same" else 5, stride=2, groups=4, bias=False)
    else:
        conv = {
            "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
            "strided": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), dilation=(1, 2)),
            "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
        }[kind]()
    conv = conv.double().requires_grad_(False)
    held = nn.Sequential(copy.deepcopy(conv))
    hold_convolutions(held)
    assert isinstance(held[0], FrozenConv2d)
    return conv, held


@pytest.mark.parametrize("kind", ["plain", "strided", "depthwise", "same", "same_odd"])
def test_the_same_numbers_in_both_backward_passes(kind):
    conv, held = of_kind(kind)
    found = []
    for layer in (conv, held):
        torch.manual_seed(1)
        x = torch.randn(2, 4, 7, 8, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        found.append((y.detach(), gradient.detach(), second))
    torch.testing.assert_close(found[1], found[0])


class Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_depthwise_convolution_is_one_in_each_pass():
    held = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16).requires_grad_(False), nn.Tanh())
    hold_convolutions(held)
    x = torch.randn(1, 16, 6, 6, requires_grad=True)
    with Counted() as counted:
        (gradient,) = torch.autograd.grad(held(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert counted.calls < 6  # torch's own: more than 16


def test_half_precision():
    held = nn.Sequential(nn.Conv2d(2, 2, 3).requires_grad_(False))
    hold_convolutions(held)
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = held(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0
