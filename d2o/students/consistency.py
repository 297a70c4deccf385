"""Students that jump along the teacher's probability-flow ODE: consistency models (Song et al. 2023), progressively
distilled ones (Salimans & Ho 2022), consistency trajectory models (Kim et al. 2024). One network call makes an image;
the first and the last can also take two.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from d2o.condition import Condition, Embedded
from d2o.diffusion.schedules import karras_sigma
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject
from d2o.losses.consistency import RHO, jump
from d2o.networks.edm_view import lowest_level
from d2o.networks.second_time import second_time
from d2o.students.base import Student
from d2o.students.multistep import DrawNoise, OwnNoise
from d2o.teachers.base import Spec

FORMS = ("cd", "pd", "ctm")
MIDDLE = 17 / 39
"""Place of the second call's noise level on Karras' scale, from sigma_min (0) to sigma_max (1): point 22 of 40 counted
from the top, as Song et al. 2023 sample ImageNet 64x64 in two steps; 1.38 of 80."""


def estimate(network: nn.Module, form: str, x: Tensor, t: Tensor, s: Tensor, embedded: Embedded) -> Tensor:
    """f(x_t, t) of forms "cd" and "pd", f(x_t, t, s) of "ctm": x [B, C, H, W], t and s [B] -> [B, C, H, W] float32."""
    return network(x, t, embedded, second_time(s)) if form == "ctm" else network(x, t, embedded)


class ConsistencyStudent(Student):
    """forward(noise [B, C, H, W] standard normal, condition, randn) -> x [B, C, H, W]
    float32.

    "cd": f(sigma z, sigma); a second step adds noise up to the level `middle` (unit Karras scale; between sigma_min and
    sigma) and calls f again.
    "ctm": F(x, sigma, s) to sigma_min, or to `middle` and from there to sigma_min. "pd": `steps` jumps over Karras'
    grid, as it was trained. Fresh noise comes from the samples' own generators (`OwnNoise`) unless `randn` gives it.
    `clamp`: estimates of the clean image are brought into the range of images at every call (never those of latents,
    nor "ctm"'s on the way to a noisy one), as the sampler of Song et al. does.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: Spec,
        sigma: float = 80.0,
        form: str = "cd",
        steps: int = 1,
        middle: float = MIDDLE,
        clamp: bool = True,
    ):
        super().__init__(network, spec, sigma)
        if form not in FORMS:
            raise unknown("form of a consistency student", form, FORMS)
        self.form, self.nfe, self.middle, self.clamp = form, steps, middle, clamp

    @property
    def record(self) -> JsonObject:
        return {
            "kind": "consistency",
            "form": self.form,
            "sigma": self.sigma,
            "steps": self.nfe,
            "middle": self.middle,
            "clamp": self.clamp,
        }

    @classmethod
    def from_record(cls, network: nn.Module, spec: Spec, record: JsonObject) -> ConsistencyStudent:
        """A record without `clamp` is from before there was one: that student goes on making the images that it
        made."""
        return cls(
            network,
            spec,
            record["sigma"],
            record["form"],
            record["steps"],
            record["middle"],
            record.get("clamp", False),
        )

    def with_steps(self, steps: int) -> ConsistencyStudent:
        """The same student, called that often. UserError: one that it cannot do."""
        if steps == self.nfe:
            return self
        if self.form == "pd":
            what = (
                f"this student was distilled to {self.nfe} {'step' if self.nfe == 1 else 'steps'} and can take no other"
                " number"
            )
            raise UserError(f"--steps {steps}: {what}", "train one with pd.final_steps, or leave --steps away")
        if steps not in (1, 2):
            raise UserError(
                f"--steps {steps}: a consistency student makes an image in 1 or 2 network calls",
                "--steps 1 or --steps 2",
            )
        other = ConsistencyStudent(self.network, self.spec, self.sigma, self.form, steps, self.middle, self.clamp)
        other.meta = self.meta
        return other.train(self.training)

    def grid(self) -> list[float]:
        """The noise levels that are visited, from sigma down to sigma_min; the network is called at all but the
        last."""
        if self.form == "pd":
            places = [i / self.nfe for i in reversed(range(self.nfe + 1))]
        else:
            places = [1.0, *([self.middle] if self.nfe == 2 else []), 0.0]
        return [karras_sigma(1 - place, lowest_level(self.network), self.sigma, RHO) for place in places]

    def forward(self, noise: Tensor, condition: Condition | Embedded = None, randn: DrawNoise | None = None) -> Tensor:
        embedded = self.check_condition(self.embed(condition), len(noise))
        grid = self.grid()
        x = noise.to(torch.float32) * self.sigma
        for i, (t, s) in enumerate(pairwise(grid)):
            if i and self.form == "cd":
                randn = randn or OwnNoise(noise)
                x = x + (t**2 - lowest_level(self.network) ** 2) ** 0.5 * randn(*x.shape[1:])
            at, to = (torch.full((len(x),), level, dtype=torch.float64, device=x.device) for level in (t, s))
            f = estimate(self.network, self.form, x, at, to, embedded)
            if self.clamp and not self.spec.latent and (self.form != "ctm" or s == grid[-1]):
                f = f.clamp(*self.spec.value_range)
            x = f if self.form == "cd" else jump(x, f, at, to)
        return x


STUDENT = ConsistencyStudent
