"""Derivatives of the critic of the teacher's U-Net, and of derivatives: R1 through its attention."""

from __future__ import annotations

import pytest
import torch

from d2o.condition import Text
from d2o.critics.unet import UNetCritic
from d2o.losses.logit_maps import over_maps, r1_of_maps, twice_differentiable
from d2o.networks.build import set_checkpointing
from tests.critics.unets import asked, moved, teacher


@pytest.mark.parametrize("kind", ["sd", "ddpmpp", "adm"])
@pytest.mark.parametrize("per", ["scale", "resnet"])
def test_recomputed_activations_change_nothing_also_in_r1(kind, per):
    x, z, condition = asked(kind)
    critic = moved(UNetCritic.of(teacher(kind), per=per))

    def gradients(double: bool) -> list:
        critic.zero_grad()
        if double:
            with twice_differentiable(x.device):
                r1_of_maps(lambda x, z: critic(x, z, condition), x, z).mean().backward()
        else:
            over_maps(critic(x, z, condition)).mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in critic.parameters()]

    for double in (False, True):
        kept = [g.clone() for g in gradients(double)]
        assert set_checkpointing(critic, True)
        again = gradients(double)
        set_checkpointing(critic, False)
        largest = max(float(g.abs().max()) for g in kept)
        assert largest > 0
        for a, b in zip(again, kept):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ddpmpp"])
@pytest.mark.parametrize("of", ["x", "xz"])
def test_r1_and_its_gradient_agree_with_finite_differences(kind, of):
    x, z, condition = asked(kind, 1)
    x, z = x.double(), z.double()
    if isinstance(condition, Text):
        condition = Text(condition.states.double(), None if condition.pooled is None else condition.pooled.double())
    critic = moved(UNetCritic.of(teacher(kind))).double()

    def value(a, b) -> torch.Tensor:
        return over_maps(critic(a, b, condition))[0]

    def r1() -> torch.Tensor:
        with twice_differentiable(x.device):
            return r1_of_maps(lambda a, b: critic(a, b, condition), x, z, of)[0]

    # |grad|^2 is the rate of change along the gradient itself.
    a, b = x.clone().requires_grad_(), z.clone().requires_grad_(of == "xz")
    grads = torch.autograd.grad(value(a, b), [a, b] if of == "xz" else [a])
    step, (dx, dz) = 1e-6, (grads[0], grads[1] if of == "xz" else torch.zeros_like(z))
    with torch.no_grad():
        slope = (value(x + step * dx, z + step * dz) - value(x - step * dx, z - step * dz)) / (2 * step)
    penalty = r1()
    assert penalty.item() == pytest.approx(float(slope), rel=1e-5) and penalty.item() > 0
    # And its gradient by the weights, along a random direction.
    penalty.backward()
    trained = [p for p in critic.parameters() if p.grad is not None]
    torch.manual_seed(4)
    ways = [torch.randn_like(p) for p in trained]
    rate = sum(float((p.grad * way).sum()) for p, way in zip(trained, ways))
    found, step = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, way in zip(trained, ways):
                p.add_(sign * step * way)
        found.append(r1().item())
        with torch.no_grad():
            for p, way in zip(trained, ways):
                p.sub_(sign * step * way)
    assert rate == pytest.approx((found[0] - found[1]) / (2 * step), rel=1e-4)
    named = {name for name, p in critic.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    attention = "attn2.to_q" if kind != "ddpmpp" else "qkv"
    assert any(attention in name for name in named) and "conv_z.weight" in named and "inputs.0.weight" in named


def test_logits_of_half_precision_are_float32():
    x, z, condition = asked("sd")
    critic = moved(UNetCritic.of(teacher("sd")))
    with torch.autocast("cpu", torch.bfloat16):
        maps = critic(x, z, condition)
        with twice_differentiable(x.device):
            exact = critic(x, z, condition)
    assert all(m.dtype == torch.float32 for m in maps)
    for half, full, expected in zip(maps, exact, critic(x, z, condition)):
        assert not torch.equal(half, full)
        torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
        torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_sample_while_the_critic_is_held_fixed():
    x, z, condition = asked("sd")
    critic = moved(UNetCritic.of(teacher("sd"))).requires_grad_(False)
    over_maps(critic(x.requires_grad_(), z, condition)).sum().backward()
    assert bool((x.grad.abs().sum((1, 2, 3)) > 0).all()) and all(p.grad is None for p in critic.parameters())
