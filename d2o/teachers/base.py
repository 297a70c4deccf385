"""The teacher contract: a diffusion model that turns noise into data in many network calls."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2o.condition import NO_CLASS, Condition, Embedded, Text, join_embedded
from d2o.diffusion.guidance import Range, guide, no_guidance, show_cfg
from d2o.diffusion.schedules import EDMSchedule, Schedule
from d2o.diffusion.solvers import Randn, Solver
from d2o.errors import UserError
from d2o.inputs import JsonObject
from d2o.interop.records import MAX_VALUES, SpecRecord, check_record
from d2o.interop.safetensors_io import tensors_sha256
from d2o.spaces.base import PIXELS, UNNAMED, LatentSpace
from d2o.spaces.load import load_space

UNSTATED = "not stated"
"""The licence, or the name, of what does not say it. Files of older versions have "unstated"."""
GUIDED_BY = " guided by "
"""Between the names of a teacher and of the network that guides it (`Teacher.guide_by`): one name for both."""


def guided_name(teacher: str, guide: str | None) -> str:
    return teacher if guide is None else f"{teacher}{GUIDED_BY}{guide}"


@dataclass(frozen=True)
class Spec:
    """What a generator takes and gives. `shape` (C, H, W) of noise and output; `space`: the name of their latent space
    (`d2o.spaces`), "pixels" if they are images themselves, with values in `value_range`; `condition` "none", "label",
    "text"; `classes` 0 unless labels; `text`: the name of the model whose text encoders prompts go through
    (`d2o.teachers.text_encoders`); `solver` and `steps` as the teacher is usually sampled; `guidable` False for one by
    class that was trained without ever dropping the class."""

    name: str
    shape: tuple[int, int, int]
    space: str = PIXELS
    condition: str = "none"
    classes: int = 0
    value_range: tuple[float, float] = (-1.0, 1.0)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    licence: str = UNSTATED
    solver: str = "heun"
    steps: int = 18
    guidable: bool = True
    text: str = ""

    def __post_init__(self) -> None:
        if math.prod(self.shape) > MAX_VALUES:
            raise UserError(
                f"{self.name}: samples of {list(self.shape)} hold more than {MAX_VALUES:,} numbers",
                "d2o makes none so large",
            )

    def to_dict(self) -> JsonObject:
        """As files hold it: since the first version they say "pixel", or "latent" with the name of the space beside."""
        record = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k != "text"}
        record["space"] = "latent" if self.latent else "pixel"
        record["latents"] = self.space if self.latent and self.space != UNNAMED else ""
        return record | ({"text": self.text} if self.text else {})

    @classmethod
    def from_dict(cls, record: JsonObject, where: str | Path = "the file") -> Spec:
        """From `to_dict`; entries that an older d2o did not write have their defaults. UserError: entries that are
        missing, wrong, beyond what a sample can be, or that this d2o does not know; `where` is in front."""
        check_record(SpecRecord, record, f"{where} describes its generator wrongly")
        if foreign := sorted(set(record) - {field.name for field in fields(cls)} - {"latents"}):
            raise UserError(
                f"{where} describes its generator by {', '.join(foreign)}, which this d2o does not know",
                "use the d2o that made it",
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        if values.get("licence") in ("", "unstated"):
            values["licence"] = UNSTATED
        named = values.pop("latents", "") or UNNAMED
        values["space"] = named if values.get("space") == "latent" else PIXELS
        return cls(**values)

    @property
    def latent(self) -> bool:
        """Whether samples are latents, not images."""
        return self.space != PIXELS

    @property
    def resolution(self) -> int:
        return self.shape[-1]


class Teacher:
    """A frozen denoiser with its schedule and solvers.

    `denoise(x_t, t, condition)`: x_t [B, C, H, W], t the schedule's time (EDM family: sigma; SD: 0 .. 999; flow: 0 ..
    1) scalar or [B] -> x_0 prediction [B, C, H, W] float32. A condition is a `Condition`, or what `embed` made of one.
    `network` is what students start from; this class calls it as `network(x_t, sigma, labels)`, a denoiser of the EDM
    family; other families override `predict`, `embed`, `unconditional`, `check_condition` and `decode`.
    """

    def __init__(
        self, network: nn.Module, spec: Spec, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ):
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = dtype
        self.meta: JsonObject = {}
        self.origin = ""  # how `load_teacher` finds it again
        self.revision: str | None = None
        self._space: LatentSpace | None = None
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.schedule: Schedule = EDMSchedule(spec.sigma_min, spec.sigma_max, getattr(network, "round_sigma", None))
        self.call: Callable[..., Any] = self.network  # what is called in its place: the same network, compiled
        self.guide: Teacher | None = None

    def denoise(self, x_t: Tensor, t: Tensor | float, condition: Condition | Embedded = None) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device, dtype=torch.float32).expand(len(x_t))
        checked = self.check_condition(self.embed(condition), len(x_t))
        half = self.dtype is not None and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else nullcontext():
            return self.predict(x_t, t, checked)

    def predict(self, x_t: Tensor, t: Tensor, condition: Embedded) -> Tensor:
        """`denoise` after its arguments were checked and spread: t [B] float32; under autocast where the teacher runs
        in half precision."""
        return self.call(x_t, t, condition)

    def embed(self, condition: Condition | Embedded) -> Embedded:
        """What the network takes: class indices, encoded prompts (each distinct one once), or None; on the teacher's
        device. What is embedded already comes back as it is. UserError: of a kind that this teacher does not take."""
        return embed_labels(self.spec, condition, self.device)

    def unconditional(self, embedded: Embedded) -> Embedded:
        """The empty condition, of the same kind and length."""
        assert isinstance(embedded, Tensor)
        return torch.full_like(embedded, NO_CLASS)

    def guide_by(self, guide: Teacher) -> None:
        """Guidance from now on is away from another network, which need not be asked for a class: an unconditional one
        (Karras et al. 2024, EDM2), or one that is worse (Karras et al. 2024b, autoguidance). UserError: it makes other
        samples, goes through other noise levels, or takes another condition."""
        mine, theirs = self.spec, guide.spec
        name, other = repr(mine.name), repr(theirs.name)
        if (mine.shape, mine.space) != (theirs.shape, theirs.space):
            made = [f"{' x '.join(map(str, spec.shape))} in space {spec.space}" for spec in (theirs, mine)]
            raise UserError(f"{other} cannot guide teacher {name}: it makes {made[0]}, the teacher {made[1]}")
        family = type(self.schedule) is type(guide.schedule) is EDMSchedule
        if not family or "text" in (mine.condition, theirs.condition):
            raise UserError(
                f"{other} cannot guide teacher {name}: guidance by a second network is for denoisers of the EDM family",
                "others are guided by themselves: --cfg alone",
            )
        if theirs.condition == "label" and mine.classes != theirs.classes:
            raise UserError(
                f"{other} cannot guide teacher {name}: it takes {theirs.classes} classes, the teacher {mine.classes}"
            )
        self.guide = guide
        licences = dict.fromkeys((mine.licence, theirs.licence))
        self.spec = replace(mine, name=guided_name(mine.name, theirs.name), licence="; ".join(licences))

    def taken(self, embedded: Embedded) -> Embedded:
        """What of another teacher's embedded condition this one takes, as its guide."""
        return embedded if self.spec.condition == "label" else None

    def guided(
        self, x_t: Tensor, t: Tensor | float, condition: Condition | Embedded = None, cfg: float | Tensor = 1.0
    ) -> Tensor:
        """Classifier-free guidance in data prediction, D_u + cfg (D_c - D_u), both in one batched call; cfg 1 is the
        plain conditional call, and [B] are the scales of each sample. D_u is the guide's, if there is one.

        For one x_t this is the same as guiding the noise prediction. UserError: nothing to guide by.
        """
        if no_guidance(cfg):
            return self.denoise(x_t, t, condition)
        self.check_cfg(cfg)
        embedded = self.embed(condition)
        if self.guide is not None:
            d_u = self.guide.denoise(x_t, t, self.guide.taken(embedded))
            return guide(self.denoise(x_t, t, embedded), d_u, cfg)
        if embedded is None:
            what = f"guidance (cfg {show_cfg(cfg)}) needs a condition, but teacher {self.spec.name!r} was given none"
            raise UserError(what)
        t = torch.as_tensor(t, device=x_t.device, dtype=torch.float32).expand(len(x_t))
        checked = self.check_condition(embedded, len(x_t))
        both = join_embedded(checked, self.unconditional(checked))
        d_c, d_u = self.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return guide(d_c, d_u, cfg)

    @torch.inference_mode()
    def sample(
        self,
        noise: Tensor,
        condition: Condition | Embedded = None,
        solver: str | Solver | None = None,
        steps: int | None = None,
        cfg: float | Tensor = 1.0,
        randn: Randn | None = None,
    ) -> Tensor:
        """Standard normal noise [B, C, H, W] -> samples [B, C, H, W] float32 in the diffusion space.

        `solver` and `steps`: the teacher's usual ones if left away. `randn` gives the fresh noise of a stochastic
        solver (`StepNoise`).
        UserError: unknown solver, a condition that does not fit, guidance without a condition.
        """
        run = solver if isinstance(solver, Solver) else self.solver(solver)
        run = run if steps is None else replace(run, steps=steps)
        noise = noise.to(self.device)
        embedded = self.embed(condition)
        embedded = embedded.to(self.device) if isinstance(embedded, (Tensor, Text)) else embedded
        prepared = self.prepare(self.check_condition(embedded, len(noise)))
        return run.run(lambda x, t: self.guided(x, t, prepared, cfg), noise, self.schedule, randn).to(torch.float32)

    def edm_view(self) -> nn.Module:
        """D(x; sigma, condition) -> x_0 of x = x_0 + sigma n, with the teacher's own weights: what students and score
        networks are copies of. Here the network itself."""
        return self.network

    def prepare(self, embedded: Embedded) -> Embedded:
        """Called once before many calls with one condition: the place for what does not change between them."""
        return embedded

    def solver(self, name: str | None = None, steps: int | None = None) -> Solver:
        """A solver by name, or the teacher's usual one; with the teacher's usual number of steps unless given."""
        usual = Solver(self.spec.solver, self.spec.steps)
        return replace(usual, name=name or usual.name, steps=steps if steps is not None else usual.steps)

    def expect_prompts(self, repeated: bool) -> None:
        """What is to come: prompts that return later, which are worth keeping encoded, or not."""

    @property
    def space(self) -> LatentSpace:
        """The space of its samples, shared by all in this process who work in it."""
        if self._space is None:
            self._space = load_space(self.spec.space, self.device)
        return self._space

    def decode(self, x: Tensor) -> Tensor:
        """Diffusion space -> images [B, C, H, W] float32 in [-1, 1]; of pixels x itself, clipped."""
        return self.space.decode(x) if self.spec.latent else x.clamp(*self.spec.value_range)

    def check_condition(self, embedded: Embedded, batch: int) -> Embedded:
        """The embedded condition if it fits. UserError: labels for an unconditional teacher, none for a conditional
        one, out of range."""
        return check_labels(self.spec, embedded, batch)

    def check_cfg(self, cfg: float | Range | Tensor) -> None:
        """UserError: guidance of a teacher that has no condition, or never learned what images are like without one."""
        if no_guidance(cfg) or self.guide is not None:
            return
        if self.spec.condition == "none":
            what = f"guidance (cfg {show_cfg(cfg)}) needs a condition, but teacher {self.spec.name!r} takes none"
            raise UserError(what)
        if not self.spec.guidable:
            what = (
                f"teacher {self.spec.name!r} was trained with a class for every image; it cannot be guided (cfg"
                f" {show_cfg(cfg)})"
            )
            raise UserError(what, "leave --cfg away")

    @property
    def record(self) -> dict[str, Any]:
        """What a file says of it that needs its network: name (its own, whatever guides it), revision, sha256 of the
        network's weights (None in a plan)."""
        if not hasattr(self, "_sha256"):
            meta = self.device.type == "meta"
            self._sha256 = None if meta else tensors_sha256(self.network.state_dict())
        name = (self.origin or self.spec.name).partition(GUIDED_BY)[0]
        return {"name": name, "revision": self.revision, "sha256": self._sha256}

    @property
    def fingerprint(self) -> str:
        """sha256 over the weights, those of its guide among them."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = tensors_sha256(self.network.state_dict())
        if self.guide is None:
            return self._fingerprint
        return hashlib.sha256(f"{self._fingerprint}{GUIDED_BY}{self.guide.fingerprint}".encode()).hexdigest()


def embed_labels(spec: Spec, condition: Condition | Embedded, device: torch.device) -> Embedded:
    """Of a network that takes class indices, or nothing: the labels of a `Condition` on the device; what is embedded
    already comes back as it is. UserError: prompts."""
    if not isinstance(condition, Condition):
        return condition
    if condition.prompts is not None:
        if spec.classes:
            raise UserError(
                f"{spec.name!r} is conditioned on {spec.classes} classes; it takes class indices, not prompts"
            )
        raise UserError(f"{spec.name!r} takes no prompts (condition: {spec.condition})", "leave --prompts away")
    return None if condition.labels is None else condition.labels.to(device)


def check_labels(spec: Spec, labels: Embedded, batch: int) -> Tensor | None:
    """Class indices fit for `spec`: None stays None without classes. -1 means "no class". UserError otherwise."""
    if spec.condition == "none":
        if labels is not None:
            raise UserError(f"{spec.name!r} is unconditional; it takes no labels")
        return None
    if labels is None:
        raise UserError(f"{spec.name!r} is conditioned on {spec.classes} classes; give labels [n] of class indices")
    if not isinstance(labels, Tensor):
        raise UserError(f"{spec.name!r} is conditioned on {spec.classes} classes; it takes class indices, not prompts")
    if labels.shape[0] != batch:
        raise UserError(f"{len(labels)} labels for a batch of {batch}")
    if (
        not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and labels.numel()
        and labels.device.type == "cpu"
    ):
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= spec.classes:
            raise UserError(
                f"label {low if low < -1 else high} is out of range; {spec.name!r} has classes 0 to {spec.classes - 1}"
            )
    return labels
