"""What a conditional critic is shown beside real and generated samples: mismatched ones, and noise (Kang et al. 2024,
section 3.3 and Table A1)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from d2o.condition import Asked, Guided, Text
from d2o.diffusion.schedules import Schedule
from d2o.errors import UserError, unknown

KINDS = ("generated", "latent", "text", "noise")
"""What a fake row is, by its number in `Fakes.kind`: generated, or real but for what is another sample's."""
BASES = ("real", "generated")


class Draw(Protocol):
    """The random numbers of a micro-batch (`d2o.methods.base.Draws`)."""

    @property
    def count(self) -> int: ...

    def rand(self, *shape: int) -> Tensor: ...

    def randn(self, *shape: int) -> Tensor: ...

    def randint(self, low: int, high: int, *shape: int) -> Tensor: ...


class Fakes(NamedTuple):
    """Fake rows: samples [B, C, H, W], their noise and condition, and the kind of each [B] int64 (`KINDS`)."""

    x: Tensor
    z: Tensor
    condition: Asked
    kind: Tensor


class Fractions(NamedTuple):
    """Shares of the fake rows that are mismatched; the rest is generated. The paper does not say them."""

    latent: float = 0.25 / 3
    text: float = 0.25 / 3
    noise: float = 0.25 / 3


def check_fractions(fractions: Fractions, sees_z: bool = True) -> Fractions:
    """UserError: no shares of a whole; noise of another sample, which a critic that is not told z could not see."""
    if min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        said = ", ".join(f"{name} {value:g}" for name, value in fractions._asdict().items())
        raise UserError(f"mix and match: {said} are no shares of the fake rows", "none below 0, at most 1 in all")
    if fractions.noise and not sees_z:
        raise UserError(
            "mix and match: the critic is not told z, so that a real sample with another's noise is real to it",
            "noise: 0",
        )
    return fractions


def partners(draw: Draw, group: int) -> Tensor:
    """For each row of a micro-batch another one [count] int64, never itself.

    Rows are taken `group` in a row, and the other is any of the same group with equal chances: micro-batches are of a
    multiple of it (`Method.micro_multiple`), so that the partner does not depend on micro-batches and processes.
    Batches come shuffled: a group of 2 will do. With `group` 1 there is no other, and the row itself is returned.
    """
    steps = 1 + draw.randint(0, max(group - 1, 1))
    rows = torch.arange(draw.count, device=steps.device)
    return rows // group * group + (rows + steps) % group


def mix_and_match(
    real: Tensor,
    z: Tensor,
    condition: Asked,
    generated: Tensor,
    draw: Draw,
    fractions: Fractions = Fractions(),
    group: int = 2,
    base: str = "real",
    sees_z: bool = True,
) -> Fakes:
    """The fake half of a critic's batch: row i is generated[i] with z[i] and its condition, or in its place, with the
    chances of `fractions`, a mismatch. With the partner j of i (`partners`):

    "latent": (real[j], z[i], c[i]); "text": (real[i], z[i], c[j]); "noise": (real[i], z[j], c[i]). `base` "generated":
    text and noise are exchanged of generated samples instead.

    A mismatch that is none to see stays generated: without another row (`group` 1), "text" where c[i] equals c[j] or
    there are no conditions, "latent" under the same condition if the critic is not told z (`sees_z` false), and "noise"
    then. `real`, `z`, `generated` [B, C, H, W]; the condition of B rows; nothing waits for the device.
    ValueError: B is no multiple of `group`. UserError: an unknown base.
    """
    if base not in BASES:
        raise unknown("base of mix and match", base, BASES)
    if len(real) % group:
        raise ValueError(f"{len(real)} rows are no multiple of the group of {group}")
    chance, other = draw.rand(), partners(draw, group)
    itself = torch.arange(len(real), device=chance.device)
    ends = torch.tensor(fractions, dtype=torch.float64).cumsum(0).to(chance)
    kind = (chance[:, None] >= ends).sum(1) + 1  # 1, 2, 3, or 4 for the rest
    kind = torch.where(kind > 3, 0, kind)
    same = same_condition(condition, other)
    kind = torch.where((other == itself) | ((kind == 2) & same), 0, kind)
    if not sees_z:
        kind = torch.where((kind == 3) | ((kind == 1) & same), 0, kind)

    def exchanged(what: int) -> Tensor:
        return torch.where(kind == what, other, itself)

    own = generated if base == "generated" else real
    column = kind.view(-1, *[1] * (real.ndim - 1))
    x = torch.where(column == 0, generated, torch.where(column == 1, real[other], own))
    return Fakes(x, z[exchanged(3)], None if condition is None else condition[exchanged(2)], kind)


def same_condition(condition: Asked, other: Tensor) -> Tensor:
    """Whether a row's condition, with the guidance scale if it has one, is that of the row `other` [B] -> [B] truth
    values."""
    if isinstance(condition, Guided):
        return same_condition(condition.embedded, other) & (condition.scale == condition.scale[other])
    if condition is None:
        return torch.ones_like(other, dtype=torch.bool)
    if isinstance(condition, Text):
        same = (condition.states == condition.states[other]).flatten(1).all(1)
        return same if condition.pooled is None else same & (condition.pooled == condition.pooled[other]).all(1)
    return condition == condition[other]


# Noise ahead of the critic -------------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """Noise that samples are shown with: time steps t [B] int64, and standard normal numbers of the samples' shape."""

    t: Tensor
    eps: Tensor


def draw_critic_noise(draw: Draw, shape: tuple[int, ...], t_range: tuple[int, int] = (0, 999)) -> Noise:
    """For samples of that shape [C, H, W], t of t_range, both ends included, equally likely. The one drawn for a row
    serves its real and its fake sample ("shared"); draw two for each to have its own. UserError: no range of steps."""
    low, high = t_range
    if not 0 <= low <= high:
        raise UserError(f"noise ahead of the critic: [{low}, {high}] is no range of time steps")
    return Noise(draw.randint(low, high + 1), draw.randn(*shape))


def noised(x: Tensor, noise: Noise, schedule: Schedule) -> Tensor:
    """alpha_t x + sigma_t eps, samples as the critic is shown them (it is told t): differentiable in x [B, C, H, W]."""
    t = noise.t.to(torch.float32).view(-1, *[1] * (x.ndim - 1))
    return schedule.alpha(t) * x + schedule.sigma(t) * noise.eps
