"""E-LatentLPIPS' random transforms of latents (Kang et al. 2024, eq. 3 and figure A1), on any number of channels.

In this order, each with its random numbers (u: uniform on [0, 1), n: standard normal; one for each sample, or two as
x, y), which are given explicitly so that several latents can undergo the same:

| set | operations | draws |
|---|---|---|
| b | flip, rot90, shift (whole pixels) | u_flip, u_rot90, u_shift [2] |
| g | scale, rotate, aniso, frac (shift by fractions) | n_scale, u_rot_pre, n_aniso, u_rot_post, n_frac [2] |
| c | brightness, contrast, saturation | u_brightness, u_contrast, u_saturation |
| o | cutout | u_cutout [2] |

All of b and g is one affine map and one resampling, continued by reflection at the borders. The published code
resamples for b alone too, so with its sym6 filters even a flip deviates by some 5 % from an exact one ("bilinear" does
not). A sample's transform depends on its own draws alone, and nothing is read by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from d2o.augment import corrupt, geometry
from d2o.augment.ada import RandomNumbers
from d2o.augment.geometry import Resample
from d2o.errors import UserError, unknown

SETS = {
    "b": ("flip", "rot90", "shift"),
    "g": ("scale", "rotate", "aniso", "frac"),
    "c": ("brightness", "contrast", "saturation"),
    "o": ("cutout",),
}
OPERATIONS = {
    "flip": ("u_flip",),
    "rot90": ("u_rot90",),
    "shift": ("u_shift",),
    "scale": ("n_scale",),
    "rotate": ("u_rot_pre", "u_rot_post"),
    "aniso": ("n_aniso",),
    "frac": ("n_frac",),
    "brightness": ("u_brightness",),
    "contrast": ("u_contrast",),
    "saturation": ("u_saturation",),
    "cutout": ("u_cutout",),
}
"""Operation -> the names of its draws."""
NAMES = tuple(name for names in OPERATIONS.values() for name in names)
PAIRS = ("u_shift", "n_frac", "u_cutout")
"""Draws of two numbers, x and y."""
SMALLEST = 2
"""Rows and columns of a latent at least."""


def operations(kinds: str) -> tuple[str, ...]:
    """The operations of `kinds` in their order: letters of sets in any order ("bgco"), names of operations, or both
    joined by + ("bg+cutout"); "none" or "": nothing. UserError: anything else."""
    found = set()
    for part in kinds.split("+"):
        if part in OPERATIONS:
            found.add(part)
        elif set(part) <= set(SETS):
            found |= {name for letter in part for name in SETS[letter]}
        elif part != "none":
            raise unknown("augmentation", part, [*SETS, *OPERATIONS, "none"])
    return tuple(name for name in OPERATIONS if name in found)


def draws_for(kinds: str, randn: RandomNumbers, rand: RandomNumbers) -> dict[str, Tensor]:
    """The draws of `kinds` for one batch: name -> [B], of `PAIRS` [B, 2]. randn and rand are the methods of a training
    step's draws, or what `ada.numbers` makes.

    The numbers of all operations are drawn whichever are asked for, so that those of "b" and "bgco" are the same with
    the same generator. UserError: unknown kinds.
    """
    wanted = [name for operation in operations(kinds) for name in OPERATIONS[operation]]
    found = {}
    for letter, numbers in (("u", rand), ("n", randn)):
        names = [name for name in NAMES if name[0] == letter]
        widths = [2 if name in PAIRS else 1 for name in names]
        for name, columns in zip(names, numbers(sum(widths)).split(widths, 1), strict=True):
            found[name] = columns if name in PAIRS else columns[:, 0]
    return {name: found[name] for name in wanted}


def draws_from_torch(kinds: str, batch: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The same from torch's own generator of the device."""
    return draws_for(
        kinds,
        lambda *shape: torch.randn(batch, *shape, device=device),
        lambda *shape: torch.rand(batch, *shape, device=device),
    )


def augment(x: Tensor, kinds: str, draws: Mapping[str, Tensor], resample: Resample = "sym6") -> Tensor:
    """Latents x [B, C, H, W], H and W >= 2 -> the same shape and type, transformed as `draws` say. Differentiable in x
    any number of times; computed in float32 or better, under autocast too.

    `draws` may hold those of other kinds, which are not used; an operation whose draw is missing does nothing.
    UserError: unknown kinds or draws, another shape.
    """
    return augment_together([x], kinds, draws, resample)[0]


def augment_together(
    latents: Sequence[Tensor], kinds: str, draws: Mapping[str, Tensor], resample: Resample = "sym6"
) -> list[Tensor]:
    """`augment` of several batches of one shape, sample i of each by the same transform (contrast and saturation about
    each one's own means); where it leads to is computed once."""
    batch, _, height, width = _shape(latents)
    first, names = latents[0], [name for operation in operations(kinds) for name in OPERATIONS[operation]]
    for name in draws:
        if name not in NAMES:
            raise unknown("draw of an augmentation", name, NAMES)
    device = first.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        u = {name: _checked(name, draws[name], batch).to(first.device) for name in names if name in draws}
        xs = [x if x.dtype == torch.float64 else x.float() for x in latents]
        if (map := _map(u, height, width)) is not None:
            places = geometry.places(map, height, width, resample)
            xs = [geometry.sampled(x, places, resample) for x in xs]
        xs = [_recoloured(x, u) for x in xs]
        if (centre := u.get("u_cutout")) is not None:
            xs = [corrupt.cut_out(x, torch.ones_like(centre[:, 0]), centre) for x in xs]
        return [x.to(given.dtype) for x, given in zip(xs, latents, strict=True)]


def _shape(latents: Sequence[Tensor]) -> torch.Size:
    shape = latents[0].shape
    if len(shape) != 4 or min(shape[2:]) < SMALLEST or any(x.shape != shape for x in latents):
        found = " and ".join(str([*x.shape]) for x in latents)
        raise UserError(f"latents to augment are [B, C, H, W] of one shape, H and W at least {SMALLEST}, not {found}")
    return shape


def _checked(name: str, values: Tensor, batch: int) -> Tensor:
    """A draw as [B], of `PAIRS` as [B, 2]."""
    shape = (batch, 2) if name in PAIRS else (batch,)
    if values.numel() != batch * len(shape) or len(values) != batch:
        raise UserError(f"the draw {name} of {batch} latents has shape {[*shape]}, not {[*values.shape]}")
    return values.reshape(shape)


def _map(u: Mapping[str, Tensor], height: int, width: int) -> Tensor | None:
    """The geometric operations among the draws as one map from result to source [B, 3, 3]; None: there are none."""
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "u_flip": lambda v: geometry.scaling(1 - 2 * (2 * v).floor(), torch.ones_like(v)),
        "u_rot90": lambda v: geometry.quarter_turns((4 * v).floor()),
        "u_shift": lambda v: geometry.translation(_pixels((2 * v - 1) * 0.125, height, width).round()),
        "n_scale": lambda v: geometry.scaling(2 ** (0.2 * v), 2 ** (0.2 * v)),
        "u_rot_pre": lambda v: geometry.rotation((2 * v - 1) * torch.pi),
        "n_aniso": lambda v: geometry.scaling(2 ** (0.2 * v), 2 ** (-0.2 * v)),
        "u_rot_post": lambda v: geometry.rotation((2 * v - 1) * torch.pi),
        "n_frac": lambda v: geometry.translation(_pixels(v * 0.125, height, width)),
    }
    maps = [step(u[name]) for name, step in steps.items() if name in u]
    return geometry.after(*maps) if maps else None


def _pixels(shift: Tensor, height: int, width: int) -> Tensor:
    """Shifts [B, 2] (right, down) in parts of the sides, in pixels."""
    return torch.stack([shift[:, 0] * width, shift[:, 1] * height], 1)


def _recoloured(x: Tensor, u: Mapping[str, Tensor]) -> Tensor:
    brightness, contrast, saturation = (
        None if (v := u.get(f"u_{name}")) is None else v[:, None, None, None].to(x.dtype) for name in SETS["c"]
    )
    if brightness is not None:
        x = x + (brightness - 0.5)
    if contrast is not None:
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (contrast + 0.5) * (x - mean)
    if saturation is not None:
        mean = x.mean(1, keepdim=True)
        x = mean + 2 * saturation * (x - mean)
    return x
