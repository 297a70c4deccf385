"""Mix and match, and noise ahead of the critic: what is exchanged, with whom, and that micro-batches change nothing."""

from __future__ import annotations

import pytest
import torch

from d2o.condition import Text
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.errors import UserError
from d2o.losses.mismatch import (
    KINDS,
    Fractions,
    check_fractions,
    draw_critic_noise,
    mix_and_match,
    noised,
    partners,
    same_condition,
)
from d2o.methods.base import Draws

CPU = torch.device("cpu")
ALL = Fractions(1 / 3, 1 / 3, 1 / 3)


def draws(n: int, seed: int = 0, start: int = 0, total: int | None = None) -> Draws:
    return Draws(seed, start, n, total or n, CPU)


def numbered(n: int) -> tuple:
    """Real samples i, generated ones -1 - i, noise 100 + i, prompts 200 + i."""
    rows = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1)
    text = Text((200 + rows).view(n, 1, 1).expand(n, 3, 2), (200 + rows).view(n, 1))
    return rows.expand(n, 1, 2, 2), 100 + rows.expand(n, 1, 2, 2), text, -1 - rows.expand(n, 1, 2, 2)


def told(fakes) -> list[tuple[int, int, int]]:
    """Of each row: whose sample (negative: generated), whose noise, whose text."""
    whose = (fakes.x[:, 0, 0, 0], fakes.z[:, 0, 0, 0] - 100, fakes.condition.states[:, 0, 0] - 200)
    return [tuple(int(v) for v in row) for row in zip(*whose)]


@pytest.mark.parametrize("group", [2, 3, 4, 12])
def test_a_partner_is_never_the_row_itself_and_never_of_another_group(group):
    seen = set()
    for seed in range(40):
        other = partners(draws(12, seed), group)
        rows = torch.arange(12)
        assert bool((other != rows).all()) and torch.equal(other // group, rows // group)
        seen |= set(enumerate(other.tolist()))
    assert len(seen) == 12 * (group - 1) or (group == 12 and len(seen) > 100)  # any of the others


@pytest.mark.parametrize("base", ["real", "generated"])
@pytest.mark.parametrize("group", [2, 4])
def test_one_thing_is_exchanged_with_the_partner_and_the_rest_stays(base, group):
    n, found = 24, set()
    for seed in range(5):
        other = partners_of(seed, n, group)
        fakes = mix_and_match(*numbered(n), draws(n, seed), Fractions(0.25, 0.25, 0.25), group, base)
        for i, (row, kind) in enumerate(zip(told(fakes), fakes.kind.tolist())):
            j, own = other[i], i if base == "real" else -1 - i
            expected = {"generated": (-1 - i, i, i), "latent": (j, i, i), "text": (own, i, j), "noise": (own, j, i)}
            assert row == expected[KINDS[kind]]
            assert row != (i, i, i)  # never a real sample with its own noise and text
            found.add(KINDS[kind])
    assert found == set(KINDS)
    assert torch.equal(fakes.condition.pooled[:, 0], fakes.condition.states[:, 0, 0])


def partners_of(seed: int, n: int, group: int) -> list[int]:
    draw = draws(n, seed)
    draw.rand()  # the chances come first
    return partners(draw, group).tolist()


def test_the_shares_are_those_that_were_asked_for():
    n = 6000
    kind = mix_and_match(*numbered(n), draws(n), Fractions(0.1, 0.2, 0.3)).kind
    shares = (torch.bincount(kind, minlength=4) / n).tolist()
    assert shares == pytest.approx([0.4, 0.1, 0.2, 0.3], abs=0.03)
    kind = mix_and_match(*numbered(n), draws(n)).kind
    assert (kind > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert mix_and_match(*numbered(n), draws(n), ALL).kind.min() >= 1
    assert mix_and_match(*numbered(n), draws(n), Fractions(0, 0, 0)).kind.max() == 0
    for which, only in enumerate((Fractions(1, 0, 0), Fractions(0, 1, 0), Fractions(0, 0, 1)), 1):
        assert bool((mix_and_match(*numbered(8), draws(8), only).kind == which).all())


@pytest.mark.parametrize(("micro", "group"), [(2, 2), (4, 2), (6, 2), (4, 4), (12, 2), (12, 4)])
def test_micro_batches_and_processes_change_nothing(micro, group):
    """A process's part of the global batch is, for the draws, one more micro-batch."""
    real, z, text, generated = numbered(12)
    whole = mix_and_match(real, z, text, generated, draws(12, 7), ALL, group)
    for start in range(0, 12, micro):
        part = slice(start, start + micro)
        given = real[part], z[part], text[part], generated[part]
        fakes = mix_and_match(*given, draws(micro, 7, start, 12), ALL, group)
        assert told(fakes) == told(whole)[part] and torch.equal(fakes.kind, whole.kind[part])


def test_a_batch_of_one_and_of_two():
    alone = mix_and_match(*numbered(1), draws(1), ALL, group=1)
    assert told(alone) == [(-1, 0, 0)] and alone.kind.tolist() == [0]  # nobody to exchange with: generated
    for seed in range(6):
        two = told(mix_and_match(*numbered(2), draws(2, seed), Fractions(1, 0, 0)))
        assert two == [(1, 0, 0), (0, 1, 1)]
    with pytest.raises(ValueError, match="1 rows are no multiple of the group of 2"):
        mix_and_match(*numbered(1), draws(1))


def test_a_mismatch_that_is_none_stays_generated():
    real, z, _, generated = numbered(4)
    labels = torch.tensor([5, 5, 2, 7])
    text_only, latent_only, noise_only = Fractions(0, 1, 0), Fractions(1, 0, 0), Fractions(0, 0, 1)
    # Two samples of one class are no mismatch of classes ...
    fakes = mix_and_match(real, z, labels, generated, draws(4), text_only)
    assert fakes.kind.tolist() == [0, 0, 2, 2] and fakes.condition.tolist() == [5, 5, 7, 2]
    assert fakes.x[:2].flatten(1)[:, 0].tolist() == [-1, -2]
    # ... but of samples and noise they are, unless the critic is not told the noise.
    assert mix_and_match(real, z, labels, generated, draws(4), latent_only).kind.tolist() == [1] * 4
    blind = mix_and_match(real, z, labels, generated, draws(4), latent_only, sees_z=False)
    assert blind.kind.tolist() == [0, 0, 1, 1]
    assert mix_and_match(real, z, labels, generated, draws(4), noise_only, sees_z=False).kind.tolist() == [0] * 4
    # Without conditions there is nothing to exchange of them.
    free = mix_and_match(real, z, None, generated, draws(4), text_only)
    assert free.condition is None and free.kind.tolist() == [0] * 4
    assert mix_and_match(real, z, None, generated, draws(4), noise_only).kind.tolist() == [3] * 4


def test_equal_prompts_are_found():
    states = torch.randn(2, 3, 2)[[0, 0, 1]]
    other = torch.tensor([1, 2, 0])
    assert same_condition(Text(states), other).tolist() == [True, False, False]
    assert same_condition(Text(states, torch.tensor([[0.0], [1.0], [2.0]])), other).tolist() == [False] * 3


@pytest.mark.parametrize("wrong", [Fractions(-0.1, 0, 0), Fractions(0.5, 0.5, 0.1)])
def test_shares_that_are_none(wrong):
    with pytest.raises(UserError, match="no shares of the fake rows"):
        check_fractions(wrong)
    assert check_fractions(ALL) == ALL
    with pytest.raises(UserError, match="not told z"):
        check_fractions(ALL, sees_z=False)
    with pytest.raises(UserError, match="base of mix and match"):
        mix_and_match(*numbered(2), draws(2), base="none")


def test_noise_is_the_same_for_the_real_and_the_fake_sample_of_a_row():
    schedule = DiscreteSchedule.scaled_linear()
    real, _, _, fake = numbered(6)
    noise = draw_critic_noise(draws(6), (1, 2, 2), (200, 210))
    assert noise.t.dtype == torch.int64 and int(noise.t.min()) >= 200 and int(noise.t.max()) <= 210
    a, b = noised(real, noise, schedule), noised(fake, noise, schedule)
    alpha = schedule.alpha(noise.t).view(-1, 1, 1, 1)
    assert torch.allclose(a - b, alpha * (real - fake), atol=1e-5)
    bar = schedule.alphas_cumprod[noise.t].float().view(-1, 1, 1, 1)
    assert torch.allclose(a, bar.sqrt() * real + (1 - bar).sqrt() * noise.eps, atol=1e-5)
    x = real.clone().requires_grad_()
    noised(x, noise, schedule).sum().backward()
    assert torch.allclose(x.grad, alpha.expand_as(x), atol=1e-6)


def test_every_step_is_drawn_both_ends_included():
    t = draw_critic_noise(draws(20_000), (1, 1, 1)).t
    assert int(t.min()) < 5 and int(t.max()) > 994 and t.float().mean().item() == pytest.approx(499.5, abs=10)
    assert set(draw_critic_noise(draws(100), (1, 1, 1), (3, 4)).t.tolist()) == {3, 4}
    assert set(draw_critic_noise(draws(9), (1, 1, 1), (999, 999)).t.tolist()) == {999}
    part = draw_critic_noise(draws(2, 3, start=4, total=6), (1, 2, 2))
    whole = draw_critic_noise(draws(6, 3), (1, 2, 2))
    assert torch.equal(part.t, whole.t[4:]) and torch.equal(part.eps, whole.eps[4:])
    with pytest.raises(UserError, match="no range of time steps"):
        draw_critic_noise(draws(2), (1, 1, 1), (5, 4))
