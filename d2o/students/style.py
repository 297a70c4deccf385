"""SPI-GAN's students: one pass of the synthesis network, whose style comes from the noise by an ODE of a tiny network
(not counted in NFE).

Besides sampling they can be walked: along the latent path h(0) -> h(1), between two noises, between two styles (Choi et
al. 2022, Figs. 9 to 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2o.condition import Condition, Embedded
from d2o.errors import UserError, unknown
from d2o.inputs import JsonObject
from d2o.students.base import Student
from d2o.students.multistep import OwnNoise
from d2o.teachers.base import Spec

NOISES = ("own", "const", "none")
"""Noise inputs of the synthesis network: each sample's own (from its start noise), the ones kept in the checkpoint, or
none."""


class StyleStudent(Student):
    """forward(noise [B, C, R, R] standard normal, condition None) -> x [B, C, R, R] float32: synthesis(h(1)).

    `truncation` psi below 1 moves styles towards the mean style, for better looks and less variety.
    """

    def __init__(self, network: nn.Module, spec: Spec, noise: str = "own", truncation: float = 1.0):
        super().__init__(network, spec)
        if noise not in NOISES:
            raise unknown("noise input of a style student", noise, NOISES)
        self.noise, self.truncation = noise, truncation

    @property
    def record(self) -> JsonObject:
        return {"kind": "style", "noise": self.noise, "truncation": self.truncation}

    @classmethod
    def from_record(cls, network: nn.Module, spec: Spec, record: JsonObject) -> StyleStudent:
        return cls(network, spec, record["noise"], record["truncation"])

    def forward(self, noise: Tensor, condition: Condition | Embedded = None) -> Tensor:
        self.check_condition(self.embed(condition), len(noise))
        return self.decode_style(self.latent(noise, 1.0), self.noises(noise))

    def latent(self, z: Tensor, t: float = 1.0) -> Tensor:
        """h(t) [B, h_dim] of noise z [B, C, R, R], 0 <= t <= 1."""
        return self.network.mapping.at(z.to(torch.float32), t)  # type: ignore[union-attr,operator]

    def latent_path(self, z: Tensor, times: Sequence[float]) -> Tensor:
        """h at sorted times [T] -> [T, B, h_dim], in one solve."""
        return self.network.mapping.path(z.to(torch.float32), times)  # type: ignore[union-attr,operator]

    def decode_style(self, h: Tensor, noises: Sequence[Tensor] | None = None) -> Tensor:
        """Styles h [B, h_dim] -> x [B, C, R, R]. `noises` None: the constant noise of the checkpoint, so that only the
        style differs."""
        synthesis: Any = self.network.synthesis
        if self.truncation != 1:
            h = self.network.mapping.truncate(h, self.truncation)  # type: ignore[union-attr,operator]
        mode = "none" if self.noise == "none" else "const"
        return synthesis(synthesis.broadcast(h), mode, noises=noises)

    def noises(self, z: Tensor) -> list[Tensor] | None:
        """The samples' own noise inputs, from their start noise alone; None where the mode takes none."""
        if self.noise != "own":
            return None
        own = OwnNoise(z)
        return [own(*shape) for shape in self.network.synthesis.noise_shapes]  # type: ignore[union-attr]


def interpolate(a: Tensor, b: Tensor, steps: int, mode: str = "lerp") -> Tensor:
    """`steps` points from a to b [B, ...] -> [steps, B, ...]. "lerp": straight (the paper's); "slerp": on the great
    circle, which keeps the norm that standard normal noise has. UserError: unknown mode, fewer than 2 steps."""
    if steps < 2:
        raise UserError(f"a path needs at least 2 steps, not {steps}")
    if mode not in ("lerp", "slerp"):
        raise unknown("interpolation", mode, ("lerp", "slerp"))
    weights = torch.linspace(0, 1, steps, device=a.device)
    if mode == "lerp":
        return torch.stack([torch.lerp(a, b, float(w)) for w in weights])
    x, y = a.flatten(1), b.flatten(1)
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp_min(1e-12)
    angle = cosine.clamp(-1, 1).acos().clamp_min(1e-6)
    points = [
        (torch.sin((1 - w) * angle) / angle.sin())[:, None] * x + (torch.sin(w * angle) / angle.sin())[:, None] * y
        for w in weights
    ]
    return torch.stack(points).reshape(steps, *a.shape)


STUDENT = StyleStudent
