"""Students of a few network calls: from x_K ~ N(0, I) step by step to x_0, each step with a latent and posterior noise
of its own.

Xiao et al. 2022 (denoising diffusion GANs), section 3.2: x_0' = G(x_{t+1}, t, z), then x_t ~ q(x_t | x_{t+1}, x_0').
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2o.condition import Condition, Embedded
from d2o.diffusion.ddgan import DDGANProcess
from d2o.inputs import JsonObject
from d2o.students.base import Student
from d2o.teachers.base import Spec

DrawNoise = Callable[..., Tensor]
"""randn(*shape) -> standard normal [B, *shape], every sample's its own."""


class OwnNoise:
    """What a sample draws after its start noise. Its generator is seeded by a hash of that noise [B, C, H, W]
    (float32), so that an image is a function of its start noise alone, whatever batch or device it is made in, as it is
    with students of one call."""

    def __init__(self, noise: Tensor):
        self.device = noise.device
        rows = noise.detach().to("cpu", torch.float32).contiguous().numpy()
        seeds = [int.from_bytes(hashlib.blake2b(row, digest_size=4).digest(), "big") for row in rows]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, *shape: int) -> Tensor:
        out = torch.empty(len(self.generators), *shape)
        for row, generator in zip(out.unbind(0), self.generators, strict=True):
            row.normal_(generator=generator)
        return out.to(self.device)


class MultistepStudent(Student):
    """forward(noise [B, C, H, W] standard normal, condition, randn) -> x [B, C, H, W] float32
    in [-1, 1].

    `network` is called as network(x_{t+1}, t [B], z [B, nz], embedded) -> x_0 in [-1, 1], `steps` times. `randn` gives
    each step's latent [B, nz] and then, but for the last step, its posterior noise [B, C, H, W]; by default both come
    from the samples' own generators (`OwnNoise`).
    """

    def __init__(self, network: nn.Module, spec: Spec, steps: int):
        super().__init__(network, spec)
        self.process = DDGANProcess(steps)
        self.nfe, self.nz = steps, int(network.nz)  # type: ignore[arg-type]

    @property
    def record(self) -> JsonObject:
        return {"kind": "multistep", "steps": self.nfe}

    @classmethod
    def from_record(cls, network: nn.Module, spec: Spec, record: JsonObject) -> MultistepStudent:
        return cls(network, spec, record["steps"])

    def forward(self, noise: Tensor, condition: Condition | Embedded = None, randn: DrawNoise | None = None) -> Tensor:
        embedded = self.check_condition(self.embed(condition), len(noise))
        randn = randn or OwnNoise(noise)
        x = noise.to(torch.float32)
        for step in reversed(range(self.nfe)):
            t = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
            x0 = self.network(x, t, randn(self.nz), embedded)
            x = self.process.posterior(x0, x, t, randn(*x.shape[1:])) if step else x0
        return x


STUDENT = MultistepStudent
