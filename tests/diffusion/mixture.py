"""A data distribution whose denoiser is known exactly: a mixture of isotropic Gaussians, as a teacher for any schedule.

With x_t = alpha x_0 + sigma eps, component k of x_t is N(alpha mu_k, v_k) with v_k = alpha^2 s_k^2 + sigma^2. So both
E[x_0 | x_t] and E[eps | x_t] are weighted means over the components, without dividing by sigma or alpha: they hold at
pure noise and without noise, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from d2o.diffusion.schedules import EDMSchedule, Schedule
from d2o.teachers.base import Spec, Teacher


class Mixture(nn.Module):
    """sum_k weights_k N(means_k, stds_k^2 I): means [K][D], stds [K], weights [K]. Everything is float64.

    The parameters are frozen, but they are parameters: a copy of the network can be trained, as the fake score of a
    distillation method is.
    """

    def __init__(self, means: Sequence[Sequence[float]], stds: Sequence[float], weights: Sequence[float] | None = None):
        super().__init__()
        weights = weights or [1 / len(stds)] * len(stds)
        self.means = nn.Parameter(torch.tensor(means, dtype=torch.float64))
        self.log_stds = nn.Parameter(torch.tensor(stds, dtype=torch.float64).log())
        self.logits = nn.Parameter(torch.tensor(weights, dtype=torch.float64).log())
        self.requires_grad_(False)

    def posterior(
        self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[eps | x_t], float64, of the shape of x_t [B, ...]; alpha and sigma numbers or [B].

        `labels` [B]: the component that a sample belongs to, -1: unknown.
        """
        x, away, variance, stds = self._components(x_t, alpha, sigma)
        alpha, sigma = (torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1) for value in (alpha, sigma))
        weight = self._logits(away, variance).softmax(1)
        if labels is not None:
            known = nn.functional.one_hot(labels.clamp(min=0), len(self.means)).to(torch.float64)
            weight = torch.where((labels < 0)[:, None], weight, known)
        x_0 = (weight[:, :, None] * (self.means + alpha * stds**2 / variance * away)).sum(1)
        eps = (weight[:, :, None] * (sigma / variance * away)).sum(1)
        return x_0.reshape(x.shape), eps.reshape(x.shape)

    def log_density(self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """log p(x_t) [B]."""
        _, away, variance, _ = self._components(x_t, alpha, sigma)
        return self._logits(away, variance).logsumexp(1) - 0.5 * self.means.shape[1] * math.log(2 * math.pi)

    def sample(self, n: int, seed: int, shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """n data points, float64 [n, D] or [n, *shape], and their components [n]."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(self.logits.softmax(0), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[labels] + self.log_stds.exp()[labels, None] * noise).reshape(
            n, *(shape or self.means.shape[1:])
        ), labels

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] of the data."""
        weight = self.logits.softmax(0)
        mean = weight @ self.means
        around = self.means - mean
        return mean, (weight[:, None] * around).T @ around + (weight @ self.log_stds.exp() ** 2) * torch.eye(
            len(mean), dtype=torch.float64
        )

    def denoiser(self, schedule: Schedule, labels: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """(x_t [B, ...], t [B]) -> E[x_0 | x_t] float64 for that schedule: what solvers call."""

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            t = t.to(torch.float64)
            return self.posterior(x_t, schedule.alpha(t), schedule.sigma(t), labels)[0]

        return denoise

    def solution(
        self, x: Tensor, start: tuple[float, float], end: tuple[float, float], labels: Tensor | None = None
    ) -> Tensor:
        """The probability-flow ODE from (alpha, sigma) `start` to `end`, to about 1e-11, in float64.

        dx = D dalpha + eps dsigma depends on the path through (alpha, sigma) only by its ends, and rescaling both
        rescales x. So it is integrated along the unit circle alpha = cos p, sigma = sin p, where nothing is singular.
        """
        angles = torch.tensor([math.atan2(sigma, alpha) for alpha, sigma in (start, end)], dtype=torch.float64)

        def slope(angle: Tensor, x: Tensor) -> Tensor:
            x_0, eps = self.posterior(x, angle.cos(), angle.sin(), labels)
            return eps * angle.cos() - x_0 * angle.sin()

        ends_on_a_step = {"step_t": angles[1:]}  # interpolating within the last step would cost digits
        solved = odeint(
            slope,
            x.to(torch.float64) / math.hypot(*start),
            angles,
            rtol=1e-11,
            atol=1e-12,
            method="dopri8",
            options=ends_on_a_step,
        )
        return solved[-1] * math.hypot(*end)

    def _components(
        self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t float64, its distances to the components' means [B, K, D], their variances [B, K, 1] and the data's
        deviations [K, 1]."""
        x, stds = x_t.to(torch.float64), self.log_stds.exp()[:, None]
        alpha, sigma = (torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1) for value in (alpha, sigma))
        return x, x.flatten(1)[:, None] - alpha * self.means, alpha**2 * stds**2 + sigma**2, stds

    def _logits(self, away: Tensor, variance: Tensor) -> Tensor:
        """log of weight times density, less the constant, [B, K]."""
        return self.logits.log_softmax(0) - 0.5 * (away**2 / variance + variance.log()).sum(2)


def gaussian_solution(
    x: Tensor, mean: float, std: float, start: tuple[float, float], end: tuple[float, float]
) -> Tensor:
    """The same for one Gaussian, in closed form: what is left after the mean shrinks as the marginal's deviation
    does."""
    (a0, s0), (a1, s1) = start, end
    return a1 * mean + (x - a0 * mean) * math.sqrt((a1**2 * std**2 + s1**2) / (a0**2 * std**2 + s0**2))


GAUSSIAN = Mixture([[0.3]], [0.5])
LINE = Mixture([[-1.0], [0.4], [1.2]], [0.2, 0.3, 0.1], [0.5, 0.3, 0.2])
PLANE = Mixture([[-1.0, -0.5], [1.0, -0.6], [0.2, 1.1]], [0.25, 0.15, 0.35], [0.5, 0.3, 0.2])


class MixtureNetwork(nn.Module):
    """network(x_t [B, D, 1, 1], t [B], labels [B] or None) -> E[x_0 | x_t] float32: the mixture's denoiser with the
    interface of a network."""

    def __init__(self, mixture: Mixture, schedule: Schedule):
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.mixture.denoiser(self.schedule, labels)(x_t, t).to(torch.float32)


class MixtureTeacher(Teacher):
    """A perfect teacher of `mixture`: shape (D, 1, 1), its components as classes (or none), with any schedule. `calls`
    lists the batch sizes of the network calls."""

    def __init__(self, mixture: Mixture = PLANE, schedule: Schedule | None = None, labelled: bool = True):
        schedule = schedule or EDMSchedule()
        count, dimensions = mixture.means.shape
        kind = {"condition": "label", "classes": count} if labelled else {}
        super().__init__(
            MixtureNetwork(mixture, schedule),
            Spec(name="mixture", shape=(dimensions, 1, 1), value_range=(-4.0, 4.0), **kind),
        )
        self.mixture, self.schedule = mixture, schedule
        self.calls: list[int] = []

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        self.calls.append(len(x_t))
        return super().predict(x_t, t, condition)


def energy_p_value(x: Tensor, y: Tensor, permutations: int = 99, seed: int = 0) -> float:
    """The permutation test of equal distributions by energy distance: the share of random relabellings that look at
    least as different."""
    both, n = torch.cat([x, y]).flatten(1).to(torch.float32), len(x)
    distances = torch.cdist(both, both)
    generator = torch.Generator().manual_seed(seed)
    sign = torch.cat([torch.full((n,), 1 / n), torch.full((len(y),), -1 / len(y))])
    signs = torch.stack([sign, *(sign[torch.randperm(len(both), generator=generator)] for _ in range(permutations))], 1)
    energy = -(signs * (distances @ signs)).sum(0)  # 2 E|x - y| - E|x - x'| - E|y - y'|
    return float((energy >= energy[0]).sum()) / (permutations + 1)
