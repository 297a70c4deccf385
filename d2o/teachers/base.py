"""The teacher contract: a diffusion model that turns noise into data in many network calls."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2o.diffusion.schedules import EDMSchedule, karras_sigmas
from d2o.diffusion.solvers import get_solver
from d2o.errors import UserError
from d2o.interop.safetensors_io import tensors_sha256


@dataclass(frozen=True)
class Spec:
    """What a generator takes and gives. `shape` (C, H, W) of noise and output; `space` "pixel" or "latent"; `condition` "none", "label", "text";
    `classes` 0 unless labels; values in `value_range` (pixel space)."""

    name: str
    shape: tuple[int, int, int]
    space: str = "pixel"
    condition: str = "none"
    classes: int = 0
    value_range: tuple[float, float] = (-1.0, 1.0)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    licence: str = "unstated"

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Spec:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)

    @property
    def resolution(self) -> int:
        return self.shape[-1]


class Teacher:
    """A frozen denoiser with its schedule and solvers.

    `denoise(x_t, t, condition)`: x_t [B, C, H, W], t the noise level (EDM family: sigma) scalar or [B], condition class indices [B] or None
    -> x_0 prediction [B, C, H, W] float32.
    """

    def __init__(self, network: nn.Module, spec: Spec, device: str | torch.device = "cpu", dtype: torch.dtype | None = None):
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = dtype
        self.meta: dict[str, Any] = {}
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.schedule = EDMSchedule(spec.sigma_min, spec.sigma_max)

    def denoise(self, x_t: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device, dtype=torch.float32).expand(len(x_t))
        condition = self.check_condition(condition, len(x_t))
        half = self.dtype is not None and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            return self.network(x_t, t, condition)

    def guided(self, x_t: Tensor, t: Tensor | float, condition: Tensor | None = None, cfg: float = 1.0) -> Tensor:
        """Classifier-free guidance in data prediction, D_u + cfg (D_c - D_u), both in one batched call; cfg 1 is the plain conditional call."""
        if cfg == 1.0:
            return self.denoise(x_t, t, condition)
        if condition is None:
            raise UserError(f"guidance (cfg {cfg}) needs a condition, but teacher {self.spec.name!r} was given none")
        t = torch.as_tensor(t, device=x_t.device, dtype=torch.float32).expand(len(x_t))
        self.check_condition(condition, len(x_t))
        both = torch.cat([condition, torch.full_like(condition, -1)])
        d_c, d_u = self.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return d_u + cfg * (d_c - d_u)

    @torch.inference_mode()
    def sample(self, noise: Tensor, condition: Tensor | None = None, solver: str = "heun", steps: int = 18, cfg: float = 1.0) -> Tensor:
        """Standard normal noise [B, C, H, W] -> samples [B, C, H, W] float32, by the deterministic `solver` in `steps` steps."""
        run = get_solver(solver)
        noise = noise.to(self.device)
        condition = None if condition is None else torch.as_tensor(condition).to(self.device)
        sigmas = karras_sigmas(steps, max(0.002, self.spec.sigma_min), min(80.0, self.spec.sigma_max)).to(self.device)
        # The solver converts between float64 and float32 itself, so all it needs is x_0 = sigma_max * noise.
        return run(lambda x, t: self.guided(x, t, condition, cfg), noise.to(torch.float64) * sigmas[0], sigmas).to(torch.float32)

    def decode(self, x: Tensor) -> Tensor:
        """Diffusion space -> images in [-1, 1]; in pixel space x itself, clipped."""
        return x.clamp(*self.spec.value_range)

    def check_condition(self, condition: Tensor | None, batch: int) -> Tensor | None:
        """The condition if it fits. UserError: labels for an unconditional teacher, none for a conditional one, out of range."""
        return check_labels(self.spec, condition, batch)

    @property
    def fingerprint(self) -> str:
        """sha256 over the weights."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = tensors_sha256(self.network.state_dict())
        return self._fingerprint


def check_labels(spec: Spec, labels: Tensor | None, batch: int) -> Tensor | None:
    """Class indices fit for `spec`: None stays None without classes. -1 means "no class". UserError otherwise."""
    if spec.condition == "none":
        if labels is not None:
            raise UserError(f"{spec.name!r} is unconditional; it takes no labels")
        return None
    if labels is None:
        raise UserError(f"{spec.name!r} is conditioned on {spec.classes} classes; give labels [n] of class indices")
    if labels.shape[0] != batch:
        raise UserError(f"{len(labels)} labels for a batch of {batch}")
    if not torch.jit.is_tracing() and not torch.compiler.is_compiling() and labels.numel() and labels.device.type == "cpu":
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= spec.classes:
            raise UserError(f"label {low if low < -1 else high} is out of range; {spec.name!r} has classes 0 to {spec.classes - 1}")
    return labels
