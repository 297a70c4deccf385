"""Losses of maps of logits, and R1 on one sample of the global batch, however that is divided."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2o.errors import UserError
from d2o.losses.adversarial import squared_gradient
from d2o.losses.logit_maps import (
    critic_loss_of_maps,
    generator_loss_of_maps,
    one_sample,
    over_maps,
    r1_of_maps,
    r1_weight,
    twice_differentiable,
)
from d2o.methods.base import Draws

CPU = torch.device("cpu")


def maps(seed: int, n: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, size, size, generator=generator) for size in (2, 4, 4)]


def test_losses_are_taken_at_every_place_by_itself():
    real, fake = maps(0), maps(1)
    by_hand = [sum((F.softplus(-r[i]) + F.softplus(f[i])).mean() for r, f in zip(real, fake)) / 3 for i in range(3)]
    assert critic_loss_of_maps(real, fake).tolist() == pytest.approx([v.item() for v in by_hand], rel=1e-5)
    generators = [sum(F.softplus(-f[i]).mean() for f in fake) / 3 for i in range(3)]
    assert generator_loss_of_maps(fake).tolist() == pytest.approx([v.item() for v in generators], rel=1e-5)
    # Not the loss of the mean logit.
    assert not torch.allclose(generator_loss_of_maps(fake), F.softplus(-over_maps(fake)), atol=1e-2)
    undecided = [torch.zeros(2, 4, 4)] * 12
    assert torch.allclose(critic_loss_of_maps(undecided, undecided), torch.full((2,), 2 * math.log(2)))


def test_maps_are_averaged_or_summed_whatever_their_size():
    values = [torch.full((2, 2, 2), 1.0), torch.full((2, 8, 8), 4.0)]
    assert over_maps(values).tolist() == [2.5, 2.5] and over_maps(values, "sum").tolist() == [5, 5]
    real, fake = maps(0), maps(1)
    assert torch.allclose(critic_loss_of_maps(real, fake, "sum"), 3 * critic_loss_of_maps(real, fake))
    assert torch.allclose(generator_loss_of_maps(fake, "sum"), 3 * generator_loss_of_maps(fake))
    with pytest.raises(UserError, match="reduction over a critic's maps"):
        over_maps(values, "max")


class Judge(nn.Module):
    """Two maps, by both x and z, and not linear in them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(4, 1, 3, padding=1), nn.Conv2d(4, 1, 2, 2)

    def forward(self, x, z):
        both = torch.tanh(torch.cat([x, z], 1))
        return [self.fine(both)[:, 0], self.coarse(both)[:, 0].square()]


def gathered(judge: nn.Module) -> torch.Tensor:
    """All gradients; R1 has none by a bias that the logits only shift with."""
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in judge.parameters()])


def pair(n: int = 4) -> torch.Tensor:
    return torch.randn(2, n, 2, 4, 4, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_r1_is_of_the_reduced_logits_by_x_or_by_both(reduce):
    judge, (x, z) = Judge(), pair()
    x.requires_grad_(), z.requires_grad_()
    by_x = squared_gradient(over_maps(judge(x, z), reduce), x)
    by_z = squared_gradient(over_maps(judge(x, z), reduce), z)
    assert torch.allclose(r1_of_maps(judge, x, z, reduce=reduce), by_x, rtol=1e-5)
    assert torch.allclose(r1_of_maps(judge, x, z, "xz", reduce), by_x + by_z, rtol=1e-5)
    with pytest.raises(UserError, match="R1"):
        r1_of_maps(judge, x, z, "z")


def test_the_weight_of_r1():
    assert r1_weight() == pytest.approx(0.01 / 2 * 16)
    assert r1_weight(0.01, 16, half=False) == pytest.approx(0.16)
    assert r1_weight(0.01, 16, lazy_gain=False) == pytest.approx(0.005)
    assert r1_weight(2.0, 4, half=False, lazy_gain=False) == 2


@pytest.mark.parametrize("row", [0, 5])
@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (1, 2), (2, 4), (4, 1), (8, 1)])
def test_r1_on_one_sample_has_the_same_gradient_however_the_batch_is_divided(row, processes, micro):
    """The loop's rules: a micro-batch's loss is weighted by its share of its process, and processes are averaged."""
    x, z = pair(8)

    def gradient(processes: int, micro: int, touched: list) -> torch.Tensor:
        judge, share = Judge(), 8 // processes
        for start in range(0, 8, micro):
            at, weight = one_sample(Draws(0, start, micro, 8, CPU), row)
            mine = slice(start + at, start + at + 1)
            loss = weight * r1_of_maps(judge, x[mine], z[mine]).mean()
            touched += [start + at] if weight else []
            (loss * micro / share / processes).backward()
        return gathered(judge)

    touched: list[int] = []
    found = gradient(processes, micro, touched)
    assert touched == [row]  # a single sample, by its place in the global batch
    judge = Judge()
    r1_of_maps(judge, x[row : row + 1], z[row : row + 1]).mean().backward()
    expected = gathered(judge)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8) and expected.abs().sum() > 0


def test_attention_can_be_differentiated_twice():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64)

    def judge(x, z):
        out = F.scaled_dot_product_attention(*(x + z).unsqueeze(1).expand(3, 1, 1, 3, 4).unbind())[:, 0]
        return [attention(out, out, out)[0].sum(2)]

    with twice_differentiable(CPU):
        (first,) = torch.autograd.grad(r1_of_maps(judge, x, x).sum(), attention.in_proj_weight)
    assert bool(first.abs().sum() > 0)
    with twice_differentiable(CPU):
        assert torch.autograd.gradgradcheck(lambda x: judge(x, x)[0], x.clone().requires_grad_())
